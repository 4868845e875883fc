"""A trained run as a folder that `transformers` loads: `python -m trainer.export run=NAME to=DIR`.

`trainer.formats` says what the parameters of our models are called elsewhere, `weights` writes them out of a
checkpoint's shards, `beside` what else belongs into the folder, `compare` loads the folder again, `sealed` encrypts it.
"""
