"""`python -m launch.doctor`: is this machine fit to train on, and if not, what mends it?

A check is a plain function that looks at one area and returns findings (`findings.Finding`). It runs in a process of
its own with a time limit (`isolation`), so one that crashes or hangs is a finding too, and the others go on.
`__main__` lists them.
"""
