"""Models: single-device code, one readable file each. Parallelism and precision are applied from outside.

The contract of a model (an `nn.Module`; build it by `_target_`, every hyper-parameter an argument):

* `forward(batch) -> Tensor`: logits. `batch` is the mapping of tensors that the task's `collate` made.
  Shapes: B samples, S source positions, T target positions, V vocabulary, C classes.
  - encoder-decoder: `source_ids` [B,S] int64, `source_mask` [B,S] bool (True = real token),
    `decoder_input_ids` [B,T] int64 -> logits [B,T,V]
  - decoder-only: `input_ids` [B,T] int64, optional `attention_mask` [B,T] bool -> logits [B,T,V]
    Either also takes packed rows, several samples in each: `segment_ids` [B,T] int64 number the samples of a row 1, 2,
    ... (0 = padding), `position_ids` [B,T] int64 count from 0 within each; the encoder-decoder has `source_...` [B,S]
    and `target_...` [B,T] of both. Nothing attends across samples, and a row may be longer than `max_positions`. The
    recurrent model knows no packed rows.
  - encoder: `input_ids` [B,T] int64, optional `attention_mask` [B,T] bool, `token_type_ids` [B,T] int64 (first text 0,
    second 1) -> logits [B,T,V] of a masked language model, which takes packed rows too, or [B,C] of a classifier
  - speech to text: `features` [B,S,M] float, M numbers for each of S frames; optional `source_mask` [B,S] bool (True =
    a frame of the recording), `decoder_input_ids` [B,T] int64 -> logits [B,T,V]
  - classifier: `inputs` [B,...] float -> logits [B,C]
  Logits come in the parameters' dtype; the task computes the loss in fp32.
  A model that `fuses_loss` has `forward(batch, head_loss=None)`: where a `head_loss` is given its output head computes
  that of hidden states and its weight, and `forward` returns it instead of logits. `Model.head_output` is how.
* `reset_parameter(name, generator)`: fills that parameter in place from `torch.Generator`, and
  `reset_parameters(generator)` all of them, in the order of `named_parameters()`. The only place of initialisation:
  what `__init__` leaves behind is arbitrary. Works after the module was built on the meta device and materialised.
* `flops_per_sample(**lengths) -> float`: floating-point operations of forward + backward for one sample
  (source_length, target_length; 6 x matrix parameters x tokens plus the attention term, Kaplan et al. 2020, PaLM
  appendix B). Decoder-only models take target_length, encoders
  source_length, classifiers of numbers nothing.
* `max_positions: int | None`: the longest sequence it can take (None = any).
* `vocab_size: int` where it has one.
* `objective: str`, optional: what it is trained for ("causal_lm", "masked_lm", "text_classification", "text_to_text");
  a task that names another one is refused.

Models that generate text also have (see `trainer.generate`):

* `start_decoding(batch) -> DecoderState`: runs the encoder (or the prompt) once. `batch` as above without the decoder
  input.
* `decode_step(state, token_ids [R]) -> logits [R,V]`: one position for R rows (batch x beams), extending the state's
  cache. `DecoderState.first_ids`: the ids to feed first where a prompt tells them, else None (the start token).
* `DecoderState.select(row_indices [R'])`: keeps/reorders/repeats rows (used for beams), returning the state to go on
  with.

A parameter used outside its own module's `forward` breaks ZeRO-3, which gathers parameters by module: a tied output
head therefore goes through the embedding module's `forward`, never through `embedding.weight` from elsewhere.
"""
