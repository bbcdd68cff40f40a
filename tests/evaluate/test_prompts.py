"""Prompts with planted lines: their length, their answers, what stands where."""

import re

import pytest
import torch

from sparse_attn.evaluate.prompts import CUE, TASKS, Maker, Source, depths

TEXT = "".join(f"def function_{i}(argument):\n    return argument * {i}\n\n" for i in range(200))


def by_bytes(text):
    return list(text.encode())


def by_words(text):
    """A tokenizer of words, spaces and single digits."""
    return [WORDS.setdefault(w, len(WORDS)) for w in re.findall(r"\d|\w+|\s+|.", text)]


WORDS = {}
ENCODERS = [by_bytes, by_words]


def decode(ids, encode):
    if encode is by_bytes:
        return bytes(ids).decode()
    words = {i: w for w, i in WORDS.items()}
    return "".join(words[i] for i in ids)


def maker(encode, length=1200, samples=3, prefix=()):
    return Maker(Source(TEXT, encode, prefix), length, samples)


def answers(prompt, encode):
    ids = prompt.ids[0].tolist()
    return [decode(ids[answer.start : answer.stop], encode) for answer in prompt.answers]


@pytest.mark.parametrize("encode", ENCODERS)
@pytest.mark.parametrize("task", TASKS)
def test_length_and_repetition(encode, task):
    prompts = [maker(encode, n).task(task) for n in (1200, 1200, 1501)]
    assert [p.ids.shape for p in prompts] == [(1, 1200), (1, 1200), (1, 1501)]
    assert torch.equal(prompts[0].ids, prompts[1].ids)
    assert len(prompts[0].answers) == 3
    assert prompts[0].text_end < prompts[0].answers[0].start
    assert prompts[0].answers[-1].stop == 1200


@pytest.mark.parametrize("encode", ENCODERS)
def test_needles_stand_at_their_depth(encode):
    for depth in depths(5):
        prompt = maker(encode).needle(depth)
        text = decode(prompt.ids[0].tolist(), encode)
        found = re.findall(r"(key_\w{4}) = (\d{5})\n", text)
        asked = re.findall(r"\nassert (key_\w{4}) == (\d{5})", text)
        assert len(found) == 3 and sorted(found) == sorted(asked)
        assert [value for _, value in asked] == answers(prompt, encode)
        body = text[: text.index("\nassert")]
        at = body.index("key_") / len(body)
        assert abs(at - depth) < 0.1
    assert depths(1) == [0] and depths(3) == [0, 0.5, 1]


@pytest.mark.parametrize("encode", ENCODERS)
def test_what_each_task_asks_for(encode):
    m = maker(encode)
    text = decode(m.multi_key().ids[0].tolist(), encode)
    planted = dict(re.findall(r"(key_\w{4}) = (\d{5})\n", text))
    asked = re.findall(r"\nassert (key_\w{4}) == (\d{5})", text)
    assert len(planted) == 12 and len(asked) == 3
    assert all(planted[name] == value for name, value in asked)
    text = decode(m.multi_value().ids[0].tolist(), encode)
    planted = re.findall(r"(key_\w{4}) = (\d{5})\n", text)
    assert len({name for name, _ in planted}) == 1
    assert planted == re.findall(r"\nassert (key_\w{4}) == (\d{5})", text)
    text = decode(m.variable_tracking().ids[0].tolist(), encode)
    values = {}
    for name, given in re.findall(r"(key_\w{4}) = (\w+)\n", text):
        values[name] = values.get(given, given)  # each name is set before it is used
    asked = re.findall(r"\nassert (key_\w{4}) == (\d{5})", text)
    assert len(values) == 9 and all(values[name] == value for name, value in asked)
    prompt = m.copying()
    ids = prompt.ids[0].tolist()
    body = ids[: prompt.text_end]
    for answer in prompt.answers:
        passage = ids[answer.start - CUE : answer.stop]
        assert any(body[i : i + len(passage)] == passage for i in range(len(body)))


def test_every_prompt_begins_with_the_prefix():
    m = maker(by_words, prefix=[7, 8])
    for prompt in (m.source.plain(700), m.needle(0.0), m.copying()):
        assert prompt.ids[0, :2].tolist() == [7, 8]
    assert m.source.plain(700).ids.shape == (1, 700)


def test_too_short_is_said():
    with pytest.raises(ValueError, match="length: 100 tokens are too few for 12 planted lines"):
        maker(by_bytes, 100).multi_key()
    with pytest.raises(ValueError, match="length: 200 tokens are too few for passages"):
        maker(by_bytes, 200).copying()
    with pytest.raises(ValueError, match=r"text: \d+ tokens are too few"):
        maker(by_bytes, 100_000).source.plain(100_000)
