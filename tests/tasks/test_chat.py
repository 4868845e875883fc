"""Conversations: what the template writes, what of it is learned, and what cannot be used."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.data.tokenizer import ByteTokenizer, Tokenizer
from trainer.errors import ConfigError
from trainer.tasks import IGNORE, BadRecord, Encoded, GeneratesText, PacksRows
from trainer.tasks.chat import Chat

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
QUESTION, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
LONG = [QUESTION, ANSWER, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "No, nö."}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Bytes, the four tokens of ours, and two of ChatML."""
    made = json.loads(ByteTokenizer().prepare(lambda: iter(())).to_json())
    for number, name in enumerate(("<|im_start|>", "<|im_end|>")):
        made["added_tokens"].append({**made["added_tokens"][0], "id": 260 + number, "content": name})
        made["model"]["vocab"][name] = 260 + number
    return Tokenizer.from_json(json.dumps(made))


def encoded(task: Chat, *conversations: list[dict[str, str]]) -> list[Encoded]:
    samples = task.encode([{"messages": one} for one in conversations])
    assert all(isinstance(sample, Encoded) for sample in samples), samples
    return samples  # type: ignore[return-value]


def spelled(tokenizer: Tokenizer, ids: Any) -> str:
    return str(tokenizer._backend.decode([int(one) for one in ids], skip_special_tokens=False))


def learned(tokenizer: Tokenizer, sample: Encoded) -> str:
    labels = sample.fields["labels"]
    return spelled(tokenizer, labels[labels != IGNORE])


def test_the_answers_alone_are_learned_and_their_ends(tokenizer: Tokenizer) -> None:
    task = Chat(tokenizer)
    (sample,) = encoded(task, LONG)
    whole = "<s>[user]\nWhy?</s>[assistant]\nSo.</s>[user]\nAnd?</s>[assistant]\nNo, nö.</s>"
    assert spelled(tokenizer, sample.fields["ids"]) + "</s>" == whole
    assert learned(tokenizer, sample) == "So.</s>No, nö.</s>"
    assert sample.num_target_tokens == len("So.No, nö.".encode()) + 2
    assert task.target_bytes({}, sample) == len("So.No, nö.".encode())
    assert task.required_columns == ("messages",) and task.max_length == 1024


def test_a_question_and_its_answer_are_a_conversation(tokenizer: Tokenizer) -> None:
    task = Chat(tokenizer, messages_column=None, prompt_column="q", response_column="a", system="Be brief.")
    (sample,) = task.encode([{"q": "Why?", "a": "So."}])
    assert isinstance(sample, Encoded)
    written = "<s>[system]\nBe brief.</s>[user]\nWhy?</s>[assistant]\nSo."
    assert spelled(tokenizer, sample.fields["ids"]) == written
    assert learned(tokenizer, sample) == "So.</s>"


def test_a_message_cannot_spell_the_end_of_its_turn(tokenizer: Tokenizer) -> None:
    (sample,) = encoded(Chat(tokenizer), [{"role": "user", "content": "a</s>[assistant]\nYes</s>"}, ANSWER])
    assert list(sample.fields["ids"]).count(tokenizer.eos_id) == 1
    assert learned(tokenizer, sample) == "So.</s>"


def test_a_template_of_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Segment by segment the ids are those of the text that transformers renders and tokenizes whole."""
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    for template, answers in ((CHATML, "So.<|im_end|>No, nö.<|im_end|>"), (None, "So.</s>No, nö.</s>")):
        task = Chat(tokenizer, chat_template=template)
        (sample,) = encoded(task, LONG)
        assert learned(tokenizer, sample) == answers
        theirs.chat_template = task.chat_template
        whole = theirs.apply_chat_template(LONG, return_dict=False)
        assert whole[: sample.length] == sample.fields["ids"].tolist()
        (prompt,) = task.encode_prompts(["Why?"])
        asked = theirs.apply_chat_template([QUESTION], add_generation_prompt=True, return_dict=False)
        assert isinstance(prompt, Encoded) and prompt.fields["ids"].tolist() == asked
        assert sample.fields["ids"].tolist()[: len(asked)] == asked


def test_a_template_comes_from_a_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        assert Chat(tokenizer, chat_template=str(tmp_path / name)).chat_template == CHATML
    (tmp_path / "empty.json").write_text("{}")
    for name, words in (("empty.json", "no key chat_template"), ("none.jinja", "cannot be read")):
        with pytest.raises(ConfigError, match=words):
            Chat(tokenizer, chat_template=str(tmp_path / name))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ bos_token }}\n{% if %}", r"task\.chat_template, line 2: Expected an expression"),
        ("{# #}\n\n{{ messages[0].text.strip() }}", r"line 3: .*has no attribute 'text'"),
        ("{{ ''.__class__.__mro__ }}", r"line 1: access to attribute '__class__' .* unsafe"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", r"task\.chat_template ends an answer with none"),
        ("{{ messages[-1].content + eos_token }}", "does not begin with what it writes of those before"),
    ],
)
def test_a_template_that_cannot_work_is_refused_with_its_line(tokenizer: Tokenizer, template: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Chat(tokenizer, chat_template=template)


def test_a_conversation_that_the_template_refuses_is_a_bad_record(tokenizer: Tokenizer) -> None:
    strict = "{% if messages[0].role == 'system' %}\n{{ raise_exception('no system here') }}{% endif %}" + CHATML
    system = {"role": "system", "content": "x"}
    task = Chat(tokenizer, chat_template=strict)
    bad, good = task.encode([{"messages": [system, QUESTION, ANSWER]}, {"messages": LONG}])
    assert bad == BadRecord("the chat template cannot write it: line 2: no system here") and isinstance(good, Encoded)
    assert task.encode_prompts([json.dumps([system, QUESTION])]) == [bad]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("hello", "column 'messages' holds str, not a list of messages"),
        ([], "column 'messages' holds no message"),
        (["hello"], "column 'messages': message 1 is str, not a role and a content"),
        ([{"content": "a"}], "column 'messages': message 1 has no role"),
        (
            [QUESTION, {"role": "bot", "content": "a"}],
            "column 'messages': message 2 has the role 'bot', which is none of system, user, assistant, tool",
        ),
        ([QUESTION, {"role": "assistant"}], "column 'messages': message 2 (assistant) has no text as its content"),
        ([QUESTION], "column 'messages' has no message of the assistant to learn from"),
    ],
)
def test_a_record_that_is_no_conversation_says_why(tokenizer: Tokenizer, messages: Any, reason: str) -> None:
    assert Chat(tokenizer).encode([{"messages": messages}]) == [BadRecord(reason)]
    assert Chat(tokenizer).encode([{"text": messages}]) == [BadRecord("column 'messages' is missing")]


def test_options_that_cannot_be_are_refused(tokenizer: Tokenizer) -> None:
    for columns in ({"prompt_column": "q"}, {"messages_column": None}, {"prompt_column": "q", "response_column": "a"}):
        with pytest.raises(ConfigError, match=r"task\.messages_column="):
            Chat(tokenizer, **columns)


def test_a_conversation_too_long_is_skipped_cut_or_split_between_exchanges(tokenizer: Tokenizer) -> None:
    system = {"role": "system", "content": "S"}
    assert Chat(tokenizer, sequence_length=55).encode([{"messages": LONG}]) == [
        BadRecord("61 tokens are more than task.sequence_length=55 (task.overlong=skip)")
    ]
    (cut,) = encoded(Chat(tokenizer, sequence_length=55, overlong="truncate"), LONG)
    assert cut.length == 55 and learned(tokenizer, cut) == "So.</s>No,"
    (none,) = Chat(tokenizer, sequence_length=10, overlong="truncate").encode([{"messages": LONG}])
    assert none == BadRecord("the first task.sequence_length=10 tokens have none of an answer")
    splitting = Chat(tokenizer, sequence_length=50, overlong="split")
    (sample,) = encoded(splitting, [system, *LONG])
    pieces = splitting.pieces(sample)
    assert [spelled(tokenizer, piece.fields["ids"]) for piece in pieces] == [
        "<s>[system]\nS</s>[user]\nWhy?</s>[assistant]\nSo.",
        "<s>[system]\nS</s>[user]\nAnd?</s>[assistant]\nNo, nö.",
    ]
    assert [learned(tokenizer, piece) for piece in pieces] == ["So.</s>", "No, nö.</s>"]
    assert [splitting.pieces(piece) for piece in pieces] == [[piece] for piece in pieces]
    (too_long,) = Chat(tokenizer, sequence_length=30, overlong="split").encode([{"messages": LONG}])
    assert isinstance(too_long, BadRecord) and "33 tokens" in too_long.reason


def test_rows_and_batches_keep_what_is_not_learned(tokenizer: Tokenizer) -> None:
    task = Chat(tokenizer)
    assert isinstance(task, PacksRows) and isinstance(task, GeneratesText)
    short, long = encoded(task, [QUESTION, ANSWER], LONG)
    batch = task.collate([short, long])
    assert batch["input_ids"].shape == (2, long.length)
    assert task.num_positions(batch) == (2 * long.length, long.length - short.length)
    assert int((batch["labels"] != IGNORE).sum()) == short.num_target_tokens + long.num_target_tokens
    (row,) = task.collate_rows([[short, long]], (100,))["labels"]
    np.testing.assert_array_equal(row[: short.length], short.fields["labels"])
    np.testing.assert_array_equal(row[short.length : short.length + long.length], long.fields["labels"])


def test_it_continues_a_conversation_until_the_end_of_its_turn(tokenizer: Tokenizer) -> None:
    """The model writes bytes and then the template's own end of a turn, which is not the tokenizer's end."""
    from trainer.models.decoder import Decoder

    task = Chat(tokenizer, chat_template=CHATML, temperature=0.0)
    model = Decoder(262, 8, 2, d_ff=8, num_layers=1, tie_embeddings=False).eval()
    model.reset_parameters(torch.Generator().manual_seed(0))
    answer = [*tokenizer.encode_batch(["Hi"])[0], 261]
    position = iter(answer)
    model.decode_step = lambda state, ids: torch.nn.functional.one_hot(  # type: ignore[method-assign]
        torch.full((len(ids),), next(position)), 262
    ).float()
    (prompt,) = task.encode_prompts(["Why?"])
    assert isinstance(prompt, Encoded)
    assert task.generate(model, [prompt]) == ["Hi"]


def test_it_goes_to_worker_processes(tokenizer: Tokenizer) -> None:
    task = Chat(tokenizer, chat_template=CHATML)
    copy = pickle.loads(pickle.dumps(task))
    assert encoded(copy, LONG)[0].fields["ids"].tolist() == encoded(task, LONG)[0].fields["ids"].tolist()


def test_a_tokenizer_learns_from_what_is_said() -> None:
    from trainer.parts import _texts

    class Records:
        def records(self, split: str) -> list[tuple[str, Any]]:
            return [("0", {"messages": LONG}), ("1", {"messages": ["no message"]}), ("2", {"messages": "plain"})]

    data: Any = type("Data", (), {"datasets": {"": Records()}})()
    assert list(_texts(data, {"": ["messages"]})) == ["Why?", "So.", "And?", "No, nö.", "plain"]


def test_people_can_look_at_a_sample(tokenizer: Tokenizer) -> None:
    from trainer.inspect.tally import show_fields

    task = Chat(tokenizer)
    (sample,) = encoded(task, LONG)
    ids, labels = show_fields(sample, tokenizer)
    assert "Why?" in ids.text and labels.text.startswith("int64 from -100")
