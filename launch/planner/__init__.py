"""Know before you pay: what a run takes and how long, and which layout is fastest."""
