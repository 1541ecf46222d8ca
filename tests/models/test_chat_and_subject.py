"""Subjects as people use them, and chat templates: written as their authors mean, and stopped where they go astray."""

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.models.files.chat import render_chat, render_template, turn_ends
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.files.tokenizer import byte_tokenizer, tokenizer_from_file
from jaxinterp.models.run import run
from jaxinterp.models.transformer import TransformerConfig, initialise

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe good<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [{"role": "user", "content": " Hi! "}]


@pytest.fixture(scope="module")
def subject():
    config = TransformerConfig(
        vocab_size=257, d_model=8, layers=1, heads=2, kv_heads=1, head_dim=4, d_mlp=8, context=64, rotary_dimensions=4
    )
    return Subject(initialise(config, jax.random.key(0)), byte_tokenizer(), "small")


def test_a_conversation_is_written_as_the_template_says():
    tokenizer = dataclasses.replace(byte_tokenizer(), chat_template=CHATML)
    assert render_chat(tokenizer, TALK) == (
        "<|im_start|>system\nBe good<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not render_chat(tokenizer, TALK, answer=False).endswith("assistant\n")
    assert turn_ends(tokenizer) == []
    with pytest.raises(UserError, match="has no chat template"):
        render_chat(byte_tokenizer(), TALK)
    with pytest.raises(UserError, match='message 0 needs a text "role"'):
        render_chat(tokenizer, [{"role": "user"}])


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot be used"),
        ("{% include '/etc/passwd' %}", "cannot be used"),
        ("{{ cycler.__init__.__globals__ }}", "cannot be used"),
        ("{{ messages.append(1) }}", "cannot be used"),
        ("{% for a in range(10**9) %}x{% endfor %}", "counts to more than"),
        ("{% for a in range(9999) %}{% for b in range(9999) %}{{ '' }}{% endfor %}{% endfor %}", "lines"),
        ("{% set n = namespace(s='ab') %}{% for a in range(90) %}{% set n.s = n.s ~ n.s %}{% endfor %}", "builds more"),
        ("{{ 'a' * 10**9 }}", "builds more than"),
        ("{{ 10 ** 1000 }}", "takes the power"),
        ("{{ '%999999999d' % 1 }}", "formats text with %"),
        ("{{ 'a'.__mul__(99) }}", "cannot be used"),
        ("{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}", "cannot be used|lines"),
        ("{{ messages | center(9999999) }}", "cannot be used"),
        ("{{ '{:>999999999}'.format(1) }}", "cannot be used|builds|writes"),
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("x" * 70_000, "70000 characters"),
        ("{% if %}", "cannot be used"),
    ],
)
def test_a_template_from_outside_is_data(template, words):
    start = time.process_time()
    with pytest.raises(UserError, match=words):
        render_template(template, messages=TALK)
    assert time.process_time() - start < 5


def test_templates_come_with_their_files(tmp_path):
    byte_tokenizer().backend.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer_from_file(tmp_path / "tokenizer.json").chat_template is None
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": CHATML}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert tokenizer_from_file(tmp_path / "tokenizer.json").chat_template == CHATML
    (tmp_path / "chat_template.jinja").write_text("own")
    assert tokenizer_from_file(tmp_path / "tokenizer.json").chat_template == "own"


def test_a_subject_runs_text(subject):
    tokens = subject.tokens("abc")
    assert tokens.tolist() == [[97, 98, 99]] and subject.words("abc") == subject.words(tokens) == ["a", "b", "c"]
    expected = run(subject.model, tokens).logits
    for prompt in ("abc", ["abc"], [97, 98, 99], [[97, 98, 99]], tokens[0], tokens, np.asarray(tokens)):
        np.testing.assert_array_equal(subject.run(prompt).logits, expected)
    trace = subject.run("abc", keep="blocks/*/mlp/out")
    assert trace.keys() == ["blocks/0/mlp/out"] == list(trace) and "embed" not in trace
    begun = dataclasses.replace(subject, tokenizer=dataclasses.replace(byte_tokenizer(), begin=256))
    assert begun.tokens("a").tolist() == [[256, 97]]


def test_a_subject_says_what_is_wrong(subject):
    with pytest.raises(UserError, match="from 1 to 2 tokens: give texts of one length"):
        subject.run(["a", "bc"])
    with pytest.raises(UserError, match="there is no token"):
        subject.tokens("")
    with pytest.raises(UserError, match="no tokenizer for a text: give token ids"):
        dataclasses.replace(subject, tokenizer=None).run("a")
    with pytest.raises(UserError, match="one row of token ids"):
        subject.words(jnp.zeros((2, 2), jnp.int32))
