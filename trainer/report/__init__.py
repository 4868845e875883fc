"""A run, or several side by side, as one HTML page and a PNG: `python -m trainer.report run=NAME [run=NAME ...]`.

`history` reads what runs wrote, `charts` says what is drawn of it and draws it, `page` writes the HTML. Nothing here
needs torch, a network or a server: the page holds all it shows.
"""
