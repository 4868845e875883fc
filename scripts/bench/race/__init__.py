"""The race of scripts/bench/race.py: its laps, its entrants, its figures."""
