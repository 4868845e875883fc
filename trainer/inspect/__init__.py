"""The data of an experiment, looked at without training (`python -m trainer.inspect`).

`gather` reads the data into `figures`, which `show` prints and draws.
"""
