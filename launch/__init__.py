"""Launchers: the same experiment, taken to every place it can run.

`python -m launch launcher=NAME experiment=...` goes one way: the trainer's own code composes and checks the experiment;
the launcher, a dataclass whose fields are the keys of configs/launcher/NAME.yaml, *renders* what it will do into
runs/NAME/launch/; unless dry_run=true it then *submits* it, and `launch.status`, `stop`, `logs` and `resume` find there
what was submitted where.

A launcher is one class and one YAML file (`_target_: launch.module.Class`). What the class has to do is said by
`launch.job.Launcher`; what it is given by `launch.job.Job`; `launch.local` is the shortest one.
"""
