"""Generation over the toy decoder: batching, chunking, forking and preemption change no token, and every page comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.errors import InternalError, RequestError
from llmc.manifest import Limits
from llmc.runtime import scheduler
from llmc.runtime.model import Model
from llmc.runtime.results import Completion
from llmc.runtime.sampling import SamplingParams, log_softmax

from . import toy
from .toy import byte_level_tokenizer, executor_of, reference_logits, toy_model, write_tokenizer

PROMPTS = [[5], [3, 1, 4, 1, 5, 9, 2, 6], [7, 7], list(range(30)), [11, 0, 12], [2] * 9, [39, 38, 37, 36, 35]]
SAMPLED: dict[str, Any] = {"max_tokens": 12, "temperature": 0.9, "top_p": 0.95, "seed": 5}


@pytest.fixture(autouse=True, params=["host samples", "device samples"])
def _device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything holds whether the host chooses the tokens or a device that runs ahead."""
    monkeypatch.setattr(toy, "DEVICE", request.param == "device samples")


def greedy_reference(prompt: list[int], count: int, vocab: int = 40) -> list[int]:
    """Greedy continuation with everything run anew for each token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(reference_logits(vocab, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def generate_all(model: Model, prompts: list[list[int]], **options: Any) -> list[Completion]:
    completions = model.generate(prompts, **options)
    assert model.pages.used == 0
    return completions


@pytest.mark.parametrize("limits", [Limits(1, 1, 1), Limits(2, 3, 1), Limits(4, 16, 8), Limits(3, 5, 2), Limits(8, 512, 512)])
def test_greedy_equals_the_reference_whatever_the_limits(limits: Limits) -> None:
    model = toy_model(limits=limits)
    for completion, prompt in zip(generate_all(model, PROMPTS, max_tokens=6), PROMPTS, strict=True):
        assert completion.token_ids == greedy_reference(prompt, 6)
        assert completion.finish_reason == "length"
        assert completion.prompt_tokens == len(prompt)
    for step in executor_of(model).steps:
        rows = len(step.input_ids)
        assert len(step.seq_lens) <= limits.max_batch
        if step.logit_rows is not None:
            assert rows <= limits.max_rows
            assert 1 <= len(step.logit_rows) <= limits.max_logit_rows
        else:
            assert rows == len(step.seq_lens)


def test_a_prompt_goes_in_smaller_chunks_beside_a_sample_that_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "ROWS_BESIDE", 4)
    model = toy_model(limits=Limits(4, 16, 8))
    prompts = [list(range(20)), list(range(30))]
    for completion, prompt in zip(generate_all(model, prompts, max_tokens=12), prompts, strict=True):
        assert completion.token_ids == greedy_reference(prompt, 12)
    steps = [np.diff(step.q_indptr).tolist() for step in executor_of(model).steps if step.logit_rows is not None]
    assert steps[:3] == [[16], [4, 12], [1, 3]]
    assert all(sum(rows) <= 4 for rows in steps[2:])


def test_the_same_seed_gives_the_same_text_alone_and_in_a_batch() -> None:
    together = generate_all(toy_model(), PROMPTS, **SAMPLED)
    for completion, prompt in zip(together, PROMPTS, strict=True):
        alone = toy_model().generate(prompt, **SAMPLED)
        assert alone.token_ids == completion.token_ids
    assert len({tuple(c.token_ids) for c in together}) > 1
    other = toy_model().generate(PROMPTS[1], **{**SAMPLED, "seed": 6})
    assert other.token_ids != together[1].token_ids


def test_without_a_seed_two_runs_differ() -> None:
    model = toy_model()
    texts = {tuple(model.generate([1, 2], temperature=2.0, max_tokens=20).token_ids) for _ in range(3)}
    assert len(texts) == 3


def test_prompts_are_chunked_beside_decoding() -> None:
    model = toy_model(limits=Limits(2, 4, 4))
    generate_all(model, [[5], list(range(30))], max_tokens=4)
    shapes = [np.diff(step.q_indptr).tolist() for step in executor_of(model).steps]
    assert [1, 3] in shapes
    assert max(sum(shape) for shape in shapes) == 4


def test_parallel_samples_share_the_prompt_and_differ() -> None:
    model = toy_model(limits=Limits(8, 64, 8))
    prompt = list(range(11))
    samples = generate_all(model, [prompt], n=4, **SAMPLED)
    executor = executor_of(model)
    # the prompt ran once: 11 rows, then one row for each further token of each sample
    assert sum(len(step.input_ids) for step in executor.steps) == 11 + 4 * 11
    # 11 positions end within a page: all samples but the last to write copy it
    assert executor.copies == 3
    assert len({tuple(s.token_ids) for s in samples}) == 4
    assert [s.sample for s in samples] == [0, 1, 2, 3]
    assert samples[0].token_ids == toy_model().generate(prompt, **SAMPLED).token_ids
    many = toy_model(limits=Limits(2, 3, 2)).generate([prompt, [5]], n=4, **SAMPLED)
    assert [s.token_ids for s in many[:4]] == [s.token_ids for s in samples]
    assert [(s.index, s.sample) for s in many] == [(i, j) for i in range(2) for j in range(4)]


def test_samples_that_end_at_once_leave_nothing() -> None:
    assert len(generate_all(toy_model(), [[1, 2, 3], [4]], n=3, max_tokens=1, temperature=1.0)) == 6


@pytest.mark.parametrize("pages", [9, 12, 17])
def test_a_full_cache_delays_and_changes_nothing(pages: int) -> None:
    options: dict[str, Any] = {"max_tokens": 20, "temperature": 0.8, "seed": 3}
    prompts = [[i, 3, 5] for i in range(6)]
    want = [toy_model().generate(p, **options).token_ids for p in prompts]
    model = toy_model(pages=pages)
    assert [c.token_ids for c in generate_all(model, prompts, **options)] == want
    recomputed = sum(len(step.input_ids) for step in executor_of(model).steps) > 6 * (3 + 19)
    assert recomputed == (pages < 24)
    model = toy_model(pages=pages)
    samples = generate_all(model, prompts[:2], n=3, **options)
    assert samples[0].token_ids == want[0]
    assert samples[3].token_ids == want[1]


def test_a_long_prompt_takes_pages_back_from_a_later_sample_in_the_same_step() -> None:
    # the later samples decode, and are planned before the earliest one, whose prompt still comes in chunks
    prompts = [[i % 40 for i in range(50)], [5], [6], [7]]
    model = toy_model(pages=16, limits=Limits(4, 8, 4))
    for completion, prompt in zip(generate_all(model, prompts, max_tokens=12), prompts, strict=True):
        assert completion.token_ids == greedy_reference(prompt, 12)
    assert sum(len(step.input_ids) for step in executor_of(model).steps) > 50 + 11 + 3 * (1 + 11)


def test_one_sample_too_large_for_the_cache_is_refused_and_nothing_leaks() -> None:
    model = toy_model(pages=5)
    with pytest.raises(RequestError, match="the KV cache is full"):
        model.generate([1, 2, 3], max_tokens=40)
    assert model.pages.used == 0
    with pytest.raises(RequestError, match="the KV cache is full"):
        model.logits(list(range(30)))
    assert model.pages.used == 0
    assert len(model.generate([1, 2, 3], max_tokens=10).token_ids) == 10


def test_the_context_ends_generation() -> None:
    model = toy_model(context=20)
    completion = model.generate([1] * 15, max_tokens=None)
    assert (len(completion.token_ids), completion.finish_reason) == (5, "length")
    with pytest.raises(RequestError, match=r"the prompt has 21 tokens and the context is 20"):
        model.generate([1] * 21)
    with pytest.raises(RequestError, match=r"prompt 1 fills the whole context of 20 tokens"):
        model.generate([[1], [1] * 20])
    assert model.pages.used == 0


@pytest.mark.parametrize(
    "ids", [[], [1, 2.5], [1, "2"], [[1], [2, 3]], np.array([1.0]), np.array([[1]]), [1, None], [2**70, 0.5], 7]
)
def test_ids_that_are_no_whole_numbers(ids: Any) -> None:
    with pytest.raises(RequestError, match="must be a list of whole numbers"):
        toy_model().logits(ids)


@pytest.mark.parametrize(
    ("ids", "wrong"), [([1, -1], -1), ([0, 10**6, -2], 10**6), ([2**70], 2**70), (np.array([3, 2**40]), 2**40)]
)
def test_ids_outside_the_vocabulary(ids: Any, wrong: int) -> None:
    with pytest.raises(RequestError, match=f"the token id {wrong} is not in the vocabulary"):
        toy_model().logits(ids)


def test_closing_a_stream_frees_its_pages() -> None:
    model = toy_model()
    executor = executor_of(model)
    with model:
        stream = model.generate(PROMPTS, n=2, stream=True, max_tokens=30)
        for _ in range(9):
            next(stream)
        assert model.pages.used > 0
        stream.close()
        assert model.pages.used == 0
        assert not executor.closed
    assert executor.closed


def test_two_open_streams_share_the_model() -> None:
    model = toy_model()
    a = model.generate(PROMPTS[1], stream=True, **SAMPLED)
    b = model.generate(PROMPTS[2], stream=True, **SAMPLED)
    pairs = list(zip(a, b, strict=True))
    assert [e.token_ids[0] for e, _ in pairs] == toy_model().generate(PROMPTS[1], **SAMPLED).token_ids
    assert [e.token_ids[0] for _, e in pairs] == toy_model().generate(PROMPTS[2], **SAMPLED).token_ids
    assert model.pages.used == 0


def test_a_failing_step_leaves_no_page_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy_model()
    executor = executor_of(model)
    run = executor.run

    def fail_late(step: object) -> np.ndarray:
        out = run(step)  # type: ignore[arg-type]
        return np.full_like(out, np.nan) if len(executor.steps) == 5 else out

    monkeypatch.setattr(executor, "run", fail_late)
    with pytest.raises(InternalError, match="not finite"):
        model.generate(PROMPTS, max_tokens=20)
    assert model.pages.used == 0
    assert len(model.generate([1], max_tokens=3).token_ids) == 3


@pytest.mark.parametrize("how", ["generate", "logits"])
def test_numbers_that_are_not_finite_stay_in_no_page(how: str) -> None:
    """The next sequence gets the page, and a kernel may multiply what is behind its end by zero."""
    model = toy_model()
    executor = executor_of(model)
    executor.embedding[7] = np.inf
    with np.errstate(invalid="ignore"):
        if how == "generate":
            with pytest.raises(InternalError, match="not finite"):
                model.generate([[1, 2], [3, 7, 5]], max_tokens=3)
        else:
            assert not np.isfinite(model.logits([3, 7, 5])).all()
    assert model.pages.used == 0
    first = slice(0, toy.PAGE_SIZE)
    assert not executor.keys[:, first].any()
    assert not executor.values[:, first].any()


def test_logprobs_are_the_models_own() -> None:
    options: dict[str, Any] = {"max_tokens": 5, "temperature": 0.7, "repetition_penalty": 1.5, "seed": 1}
    completion = toy_model().generate([3, 1, 4], logprobs=3, **options)
    assert completion.token_ids == toy_model().generate([3, 1, 4], **options).token_ids
    want = log_softmax(reference_logits(40, [3, 1, 4, *completion.token_ids]))
    assert len(completion.logprobs) == 5
    for i, found in enumerate(completion.logprobs):
        row = want[2 + i]
        assert found.token_id == completion.token_ids[i]
        assert found.logprob == pytest.approx(row[found.token_id], abs=1e-5)
        assert [t for t, _ in found.top] == np.argsort(-row, kind="stable")[:3].tolist()
        assert [p for _, p in found.top] == pytest.approx(np.sort(row)[::-1][:3].tolist(), abs=1e-5)
    only = toy_model().generate([3, 1, 4], logprobs=0, max_tokens=1)
    assert only.logprobs[0].top == []


@pytest.mark.parametrize("limits", [Limits(1, 4, 3), Limits(4, 3, 8), Limits(4, 64, 64)])
def test_logits_and_score_are_teacher_forced(limits: Limits) -> None:
    model = toy_model(limits=limits)
    ids = [int(i) for i in np.random.default_rng(0).integers(0, 40, 23)]
    want = reference_logits(40, ids)
    found = model.logits(np.array(ids))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, want)
    score = model.score(ids)
    direct = log_softmax(want)[np.arange(22), ids[1:]]
    np.testing.assert_allclose(score.logprobs, direct, rtol=1e-6)
    assert score.total == pytest.approx(float(direct.astype(np.float64).sum()))
    assert score.perplexity == pytest.approx(float(np.exp(-direct.astype(np.float64).mean())))
    assert model.pages.used == 0


def test_a_device_is_kept_ahead_and_its_surplus_tokens_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy, "DEVICE", True)
    model = toy_model()
    pipeline = executor_of(model).pipeline
    assert pipeline is not None
    prompt, want = PROMPTS[1], greedy_reference(PROMPTS[1], 12)
    assert model.generate(prompt, max_tokens=12).token_ids == want
    # no step past the last token, and no more in flight than is worth it
    assert len(executor_of(model).steps) == 12
    assert pipeline.most_ahead == pipeline.depth
    executor_of(model).steps.clear()
    end = next(i for i in range(2, 12) if want[i] not in want[:i])
    monkeypatch.setattr(Model, "_eos_ids", frozenset({want[end]}))
    found = model.generate([prompt, PROMPTS[4]], max_tokens=12)
    assert (found[0].token_ids, found[0].finish_reason) == (want[: end + 1], "stop")
    assert model.pages.used == 0
    monkeypatch.setattr(toy, "DEVICE", False)
    assert found[1].token_ids == toy_model().generate(PROMPTS[4], max_tokens=12).token_ids


def test_timing_and_events_add_up() -> None:
    model = toy_model()
    whole = Completion(0, 0)
    events = list(model.generate([1, 2, 3], stream=True, max_tokens=4))
    for event in events:
        whole.add(event)
    assert [e.finish_reason for e in events] == [None, None, None, "length"]
    assert whole.token_ids == greedy_reference([1, 2, 3], 4)
    assert whole.timing is not None
    assert 0 < whole.timing.prompt <= whole.timing.first_token
    assert whole.timing.tokens_per_second > 0


@pytest.fixture
def text_model(tmp_path: Path) -> Model:
    """A toy model with a byte-level tokenizer, and logits flat enough to visit many tokens."""
    backend = byte_level_tokenizer()
    files = write_tokenizer(tmp_path, backend)
    return toy_model(vocab=backend.get_vocab_size(), folder=tmp_path, tokenizer=files, context=256, pages=256)


def test_stop_strings_end_the_text_before_them(text_model: Model) -> None:
    params: dict[str, Any] = {"max_tokens": 60, "temperature": 1.5, "seed": 2, "ignore_eos": True}
    whole = text_model.generate("hello", **params)
    assert len(whole.text) > 20
    stop = whole.text[10:13]
    first = whole.text.index(stop)
    stopped = text_model.generate("hello", stop=[stop, "not there"], **params)
    assert (stopped.text, stopped.finish_reason) == (whole.text[:first], "stop")
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]
    pieces = [e.text for e in text_model.generate("hello", stop=[stop], stream=True, **params)]
    assert "".join(pieces) == stopped.text
    # a text that ends in the start of a stop string is given back whole
    end = text_model.generate("hello", stop=whole.text[-1:] + "\x00never", **params)
    assert (end.text, end.finish_reason) == (whole.text, "length")
    assert text_model.pages.used == 0


def test_the_end_token_ends_without_text(text_model: Model) -> None:
    end = text_model.manifest.tokenizer.eos_token_ids[0]  # type: ignore[union-attr]
    executor = executor_of(text_model)
    executor.head[:, end] = 0
    executor.head[:, :] *= 0.01
    run = executor.run

    def ends_at_third(step: object) -> np.ndarray:
        out = run(step)  # type: ignore[arg-type]
        out[:, end] = 50.0 if len(executor.steps) == 3 else -50.0
        return out

    executor.run = ends_at_third  # type: ignore[method-assign]
    completion = text_model.generate("hello", max_tokens=10)
    assert completion.finish_reason == "stop"
    assert completion.token_ids[-1] == end
    assert len(completion.token_ids) == 3
    assert "</s>" not in completion.text
    executor.steps.clear()
    assert len(text_model.generate("hello", max_tokens=10, ignore_eos=True).token_ids) == 10
    assert text_model.pages.used == 0


def test_text_and_messages_become_the_tokens_they_should(text_model: Model) -> None:
    tokenizer = text_model.tokenizer
    assert tokenizer is not None
    start = text_model.manifest.tokenizer.bos_token_id  # type: ignore[union-attr]
    assert text_model.encode("hello")[0] == start
    messages = [{"role": "user", "content": "hello"}]
    ids = text_model.encode(messages)
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>[user] hello\n[assistant] "
    assert ids.count(start) == 1
    params: dict[str, Any] = {"max_tokens": 5}
    single = text_model.generate(messages, **params)
    assert single.token_ids == text_model.generate(ids, **params).token_ids
    mixed = text_model.generate(["hello", messages, ids], **params)
    assert [m.token_ids for m in mixed[1:]] == [single.token_ids] * 2


def test_bad_requests_say_what_is_wrong(text_model: Model) -> None:
    cases: list[tuple[object, dict[str, Any], str]] = [
        ([], {}, "not empty"),
        (3, {}, "a prompt must be text"),
        ([[]], {}, "not empty"),
        ([1.5], {}, "token ids"),
        ([0, 99999], {}, "99999 is not in the vocabulary"),
        ("hi", {"n": 0}, "n=0"),
        ("hi", {"temprature": 1}, "no sampling parameter temprature"),
        ("hi", {"top_p": 2}, "top_p=2"),
        ([{"role": "user"}], {}, r"messages\[0\] has no \"content\""),
    ]
    for prompt, options, message in cases:
        with pytest.raises(RequestError, match=message):
            text_model.generate(prompt, **options)
    with pytest.raises(RequestError, match="not both"):
        text_model.generate("hi", SamplingParams(), seed=3)
    with pytest.raises(RequestError, match="at least 2"):
        toy_model().score([1])
    bare = toy_model()
    with pytest.raises(RequestError, match="no tokenizer"):
        bare.generate("hi")
    with pytest.raises(RequestError, match="stop strings need a tokenizer"):
        bare.generate([1], stop="x")
    with pytest.raises(RequestError, match="no chat template"):
        bare.apply_chat_template([{"role": "user", "content": "x"}])
    bare.close()
    with pytest.raises(RequestError, match="closed"):
        bare.generate([1])
