"""One model on several ranks at once: tensor parallelism (its matrices are split) and sequence parallelism (its
positions are), both applied from outside to models that know nothing of ranks.

`layout` says which ranks hold what, `slices` how a rank's part lies in the whole parameter, `tensor` and `sequence`
change the modules of a model that has been built, `split` does both.
"""
