"""A resolved configuration as the formulas want it: its model's `Shape`, and its run's `Layout` on so many ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from trainer.errors import ConfigError
from trainer.estimate.layout import Layout, System
from trainer.estimate.shape import Other, Shape
from trainer.models.scaling import as_decoder
from trainer.plan import RunPlan, make_plan

if TYPE_CHECKING:
    from trainer.config import Config

FRAMES_PER_SECOND = 100
STRIDE = 2


def shape_of(config: Config) -> Shape:
    """The numbers of the configuration's model, its parameters exactly.

    Transformers of ours are read from the configuration; other models are built on the meta device, and what they keep
    for the backward pass is estimated from the outputs of their modules. Raises ConfigError for a model that cannot be
    built.
    """
    part = as_decoder(config.model)
    target = part["_target_"]
    read = {
        "trainer.models.decoder.Decoder": _decoder,
        "trainer.models.encoder_decoder.EncoderDecoder": _encoder_decoder,
        "trainer.models.encoder.Encoder": _encoder,
        "trainer.models.speech.SpeechToText": _speech,
        "trainer.models.vit.ViT": _vit,
    }.get(target)
    return read(part) if read is not None else _other(config)


def _decoder(part: Mapping[str, Any]) -> Shape:
    d_model, heads, layers = part["d_model"], part["num_heads"], part["num_layers"]
    bias = part.get("bias", "none")
    norms = 2 if part.get("norm", "rms") == "layer" and bias == "all" else 1
    head_dim = part.get("head_dim") or d_model // heads
    learned = part.get("positions", "rotary") == "learned"
    return Shape(
        d_model=d_model,
        num_heads=heads,
        num_kv_heads=part.get("num_kv_heads"),
        head_dim=head_dim,
        d_ff=part["d_ff"],
        decoder_layers=layers,
        vocab_size=part["vocab_size"],
        gated=part.get("activation", "swiglu") in ("swiglu", "geglu"),
        relu=part.get("activation") == "relu",
        tied=part.get("tie_embeddings", False),
        bias=bias == "all",
        qkv_bias=bias == "qkv",
        norms=norms,
        positions=part.get("max_positions", 2048) if learned else 0,
        extra=norms * d_model + (2 * head_dim * layers if part.get("qk_norm") else 0),
        rotary=not learned,
        dropout=part.get("dropout", 0.0),
        attention_dropout=part.get("attention_dropout", 0.0),
    )


def _encoder_decoder(part: Mapping[str, Any]) -> Shape:
    d_model, heads, vocab_size = part["d_model"], part["num_heads"], part["vocab_size"]
    bias = part.get("bias", True)
    norms = 2 if part.get("norm", "layer") == "layer" and bias else 1
    kind = part.get("positions", "sinusoidal")
    final_norms = 2 * ((part.get("norm_position", "pre") == "pre") + part.get("embedding_norm", False))
    extra = final_norms * norms * d_model + (vocab_size if part.get("head_bias") else 0)
    return Shape(
        d_model=d_model,
        num_heads=heads,
        head_dim=part.get("d_kv"),
        d_ff=part["d_ff"],
        encoder_layers=part["encoder_layers"],
        decoder_layers=part["decoder_layers"],
        vocab_size=vocab_size,
        gated=part.get("activation", "relu") in ("swiglu", "geglu"),
        relu=part.get("activation", "relu") == "relu",
        tied=part.get("tie_embeddings", True),
        bias=bias,
        norms=norms,
        positions=2 * part["max_positions"] if kind == "learned" else 0,
        extra=extra + (2 * part.get("relative_buckets", 32) * heads if kind == "relative" else 0),
        relative=kind == "relative",
        dropout=part.get("dropout", 0.1),
        attention_dropout=part.get("attention_dropout", 0.0),
    )


def _encoder(part: Mapping[str, Any]) -> Shape:
    d_model, head = part["d_model"], part.get("head", "masked_lm")
    square, classes = d_model * (d_model + 1), part.get("num_classes") or 0
    extra = 2 * d_model + part.get("token_types", 2) * d_model
    extra += square + 2 * d_model + part["vocab_size"] if head == "masked_lm" else square + classes * (d_model + 1)
    return Shape(
        d_model=d_model,
        num_heads=part["num_heads"],
        d_ff=part["d_ff"],
        encoder_layers=part["num_layers"],
        vocab_size=part["vocab_size"],
        tied=True,
        bias=True,
        norms=2,
        positions=part.get("max_positions", 512),
        extra=extra,
        dropout=part.get("dropout", 0.1),
        attention_dropout=part.get("attention_dropout", 0.1),
        classifies=head != "masked_lm",
    )


def _speech(part: Mapping[str, Any]) -> Shape:
    d_model, layers = part["d_model"], part["encoder_layers"] + 2 * part["decoder_layers"]
    convolutions = 3 * d_model * (part.get("num_mels", 80) + d_model) + 2 * d_model
    return Shape(
        d_model=d_model,
        num_heads=part["num_heads"],
        d_ff=part["d_ff"],
        encoder_layers=part["encoder_layers"],
        decoder_layers=part["decoder_layers"],
        vocab_size=part["vocab_size"],
        tied=True,
        bias=True,
        norms=2,
        positions=part.get("max_positions", 448),
        extra=convolutions + 4 * d_model - layers * d_model,  # keys have no bias
        source_divisor=STRIDE,
        dropout=part.get("dropout", 0.0),
        attention_dropout=part.get("attention_dropout", 0.0),
    )


def _vit(part: Mapping[str, Any]) -> Shape:
    d_model, classes = part["d_model"], part["num_classes"]
    positions = _patches(part)
    pixels = part.get("in_channels", 3) * part["patch_size"] ** 2
    return Shape(
        d_model=d_model,
        num_heads=part["num_heads"],
        d_ff=part["d_ff"],
        encoder_layers=part["num_layers"],
        bias=True,
        norms=2,
        positions=positions + 1,  # and the class token
        extra=(pixels + 1) * d_model + 2 * d_model + (d_model + 1) * classes,
        dropout=part.get("dropout", 0.0),
        attention_dropout=part.get("attention_dropout", 0.0),
        classifies=True,
    )


def _patches(part: Mapping[str, Any]) -> int:
    return 1 + int(prod(side // part["patch_size"] for side in part["image_size"]))


def _other(config: Config) -> Shape:
    """Any other model, by building it on the meta device and, where it reads numbers, passing one sample forward."""
    import torch

    from trainer.build import build

    with torch.device("meta"):
        model: Any = build(config.model, "model")
    if hasattr(model, "theirs"):
        return _of_transformers(model)
    lengths = dict(zip(("source_length", "target_length"), sequence_lengths(config), strict=True))
    taken = {name: length for name, length in lengths.items() if length}
    try:
        flops = float(model.flops_per_sample(**taken))
    except (AttributeError, TypeError):
        flops = 6.0 * sum(parameter.numel() for parameter in model.parameters()) * max(1, sum(taken.values()))
    sizes = [sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()]
    activations = _recurrent_numbers(model, **lengths) if hasattr(model, "readout") else _module_numbers(model, config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Shape(other=Other(parameters, flops, activations, max(sizes)))


def _of_transformers(model: Any) -> Shape:
    """A model of transformers, by the names that its configuration has for these numbers; parameters that they do not
    explain are `extra`."""
    theirs, names = model.theirs.config.get_text_config(), [name for name, _ in model.theirs.named_parameters()]

    def named(*known: str, default: Any = None) -> Any:
        return next((getattr(theirs, name) for name in known if getattr(theirs, name, None)), default)

    d_model = named("hidden_size", "d_model", "n_embd", default=0)
    layers = named("num_hidden_layers", "num_layers", "n_layer", default=0)
    seq2seq, causal = model.kind in ("seq2seq", "speech_seq2seq"), model.kind == "causal_lm"
    speaks = seq2seq or model.kind in ("causal_lm", "masked_lm")
    encoder, decoder = (0, layers) if causal else (layers, 0)
    if seq2seq:
        encoder = named("encoder_layers", "num_layers", default=layers)
        decoder = named("decoder_layers", "num_decoder_layers", default=layers)
    head = model.theirs.get_output_embeddings() if speaks else None
    shape = Shape(
        d_model=d_model,
        num_heads=named("num_attention_heads", "encoder_attention_heads", "num_heads", "n_head", default=1),
        num_kv_heads=named("num_key_value_heads"),
        head_dim=named("head_dim", "d_kv"),
        d_ff=named("intermediate_size", "encoder_ffn_dim", "d_ff", "n_inner", default=4 * d_model),
        encoder_layers=encoder,
        decoder_layers=decoder,
        vocab_size=named("vocab_size", default=0) if speaks else 0,
        gated=any("gate_proj" in name or "wi_1" in name or "gate_up" in name for name in names),
        tied=head is not None and head.weight is model.theirs.get_input_embeddings().weight,
        bias=any(name.endswith(".bias") for name in names),
        norms=2 if any("norm" in name.lower() and name.endswith(".bias") for name in names) else 1,
        rotary=named("rope_theta", "rope_parameters") is not None,
        relative=named("relative_attention_num_buckets") is not None,
        source_divisor=STRIDE if model.kind == "speech_seq2seq" else 1,
        dropout=float(named("dropout", "dropout_rate", "hidden_dropout_prob", "resid_pdrop", default=0.0)),
        attention_dropout=float(named("attention_dropout", "attention_probs_dropout_prob", default=0.0)),
        classifies=not speaks,
    )
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    parameters, trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    return replace(shape, extra=parameters - shape.parameters, trained=trained / max(1, parameters))


def _recurrent_numbers(model: Any, source_length: int, target_length: int) -> float:
    """Of `LSTMSeq2Seq`: gates, cell and output of each layer and position (cuDNN keeps 6 numbers a unit), scores of
    additive attention, and the logits with their gradient."""
    size, layers = model.hidden_size, model.decoder.num_layers
    recurrent = 6 * size * layers * (source_length + target_length)
    scores = 2 * size * source_length * target_length if model.attention == "bahdanau" else 0
    return float(recurrent + scores + 2 * target_length * model.vocab_size + 6 * size * target_length)


def _module_numbers(model: Any, config: Config) -> float:
    """Outputs of all modules without children of one forward pass over one sample; several times the parameters where
    that cannot be tried."""
    import torch

    shape = config.task.get("input_shape") or getattr(model, "image_shape", None)
    size = config.model.get("input_size")
    given = tuple(shape) if shape is not None else (size,) if size is not None else None
    if given is None:
        return 4.0 * float(sum(parameter.numel() for parameter in model.parameters()))
    total = 0

    def count(_module: Any, _inputs: Any, output: Any) -> None:
        nonlocal total
        total += output.numel() if isinstance(output, torch.Tensor) else 0

    for module in model.modules():
        if not any(True for _ in module.children()):
            module.register_forward_hook(count)
    model({"inputs": torch.empty((1, *given), device="meta")})
    return 2.0 * total  # and as much of what stands between the modules


def sequence_lengths(config: Config) -> tuple[int, int]:
    """(source, target): the longest that the task makes of a sample, or the packed rows; 0 for a side there is not.

    Raises ConfigError where neither can be told.
    """
    task, data = config.task, config.data
    row = data.get("row_length") if data.get("batching") == "packed" else None
    encoder = config.model["_target_"].endswith((".Encoder", ".ViT"))
    if row is not None:
        both = tuple(row) if isinstance(row, list | tuple) else (row,)
        return (both[0], both[1]) if len(both) == 2 else (both[0], 0) if encoder else (0, both[0])
    if config.model["_target_"].endswith(".ViT"):
        return _patches(config.model), 0
    if "max_source_length" in task:
        return int(task["max_source_length"]), int(task["max_target_length"])
    if "max_seconds" in task:
        return int(task["max_seconds"] * FRAMES_PER_SECOND), task["max_target_length"]
    if "input_length" in task:
        return task["input_length"], _corrupted(task)
    length = task.get("sequence_length") or task.get("max_length")
    if length is not None:
        return (length, 0) if encoder else (0, length)
    return 0, 0


def _corrupted(task: Mapping[str, Any]) -> int:
    """Tokens of the longest target of span corruption (T5, Raffel et al. 2020, section 3.1.4)."""
    longest = 0
    for one in task["denoisers"]:
        density, span = one["noise_density"], one.get("mean_span_length")
        spans = density / span if span else 0.0
        raw = (task["input_length"] - 1) / (1 - density + spans)
        longest = max(longest, int(raw * (density + spans)) + 2)
    return longest


def layout_of(config: Config, ranks: int, lengths: tuple[int, int] | None = None) -> Layout:
    """The configuration's run on so many ranks. lengths: positions of every source and target, None: the longest.

    With batch.micro_tokens, a micro-batch holds as many samples of these lengths as its budget allows. Raises
    ConfigError where the batch does not divide (`trainer.plan`).
    """
    plan = make_plan(config, ranks)
    source, target = lengths or sequence_lengths(config)
    micro_size, accumulation = _micro_batches(plan, source + target)
    rows = 2 if config.task["_target_"].endswith(".Preference") else 1  # both answers
    engine = config.engine
    return Layout(
        ranks=ranks,
        tensor=plan.tensor_parallel,
        sequence=plan.sequence_parallel,
        zero_stage=plan.zero_stage,
        offload_optimizer=engine.offload_optimizer.value,
        offload_parameters=engine.offload_parameters.value,
        offload_activations=engine.offload_activations.value,
        recompute=engine.recompute.value,
        micro_size=micro_size * rows,
        accumulation=accumulation,
        source_length=source,
        target_length=target,
        target_fraction=config.task.get("mask_fraction", 1.0),
        varying_batches=config.steps * accumulation if lengths is None and _varies(config) else 0.0,
        precision=config.precision.value,
        ema=config.ema.decay is not None,
        system=_system(config, plan),
    )


def _varies(config: Config) -> bool:
    """Whether batches are as long as their longest sample, each another length."""
    alike = config.data.get("batching") == "packed" or "input_length" in config.task
    return not alike and not config.model["_target_"].endswith(".ViT")


def _micro_batches(plan: RunPlan, positions: int) -> tuple[float, float]:
    if plan.micro_size is not None and plan.accumulation is not None:
        return plan.micro_size, plan.accumulation
    assert plan.micro_tokens is not None
    fitting = max(1, plan.micro_tokens // max(1, positions))
    micro_size = min(fitting, plan.rank_size)
    return micro_size, plan.rank_size / micro_size


def _system(config: Config, plan: RunPlan) -> System:
    """What our engines hold in this precision (docs/sharding.md)."""
    zero, narrow = plan.engine == "zero", plan.precision != "fp32"
    width = 2.0 if narrow else 4.0
    fused = not config.model["_target_"].endswith((".LSTMSeq2Seq", ".HFModel"))
    gradient = {0: 4.0, 1: 6.0 if narrow else 4.0}.get(plan.zero_stage, 4.0 if plan.precision == "bf16" else width)
    return System(
        working=width,
        held=width,
        master=4.0 if narrow or zero else 0.0,
        gradient=gradient,
        arriving=width if narrow or zero else 0.0,
        moments=optimizer_bytes(config),
        sent_gradient=width if zero else 4.0,
        all_reduces_gradients=plan.zero_stage in (0, 1, 2),
        reduces_every_micro_batch=plan.zero_stage >= 2,
        compiled=config.engine.compile,
        overlaps=False,
        head_loss="fused" if fused else "eager",
    )


def optimizer_bytes(config: Config) -> float:
    """Of fp32 states a parameter: two moments of AdamW and its kin, one of Lion, Muon (matrices) and SGD's momentum."""
    part = config.optimizer
    name = part["_target_"].rpartition(".")[2]
    one = {"Lion": 4.0, "SGD": 4.0 if part.get("momentum") else 0.0, "Muon": 4.0, "Adafactor": 0.1}
    extra = 4.0 if part.get("amsgrad") else 0.0
    return one.get(name, 8.0 + extra)


def check_shape(shape: Shape, config: Config) -> None:
    """Raises ConfigError for a model whose sequences have no length that the formulas could use."""
    if shape.other is None and not any(sequence_lengths(config)):
        raise ConfigError(
            f"task={config.task['_target_']} does not say how long its sequences are; set task.sequence_length, or"
            " give the lengths."
        )
