"""A random decoder in NumPy behind the runtime's Executor protocol, an artifact manifest for it, and two small tokenizers."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from llmc.errors import InternalError
from llmc.manifest import KvInfo, KvLayer, Limits, Manifest, ModelInfo, TokenizerFiles
from llmc.runtime.batch import Step
from llmc.runtime.executor import Draw
from llmc.runtime.model import Model
from llmc.runtime.sampling import Sampler

PAGE_SIZE = 4
HEADS, K_DIM, V_DIM, LAYERS = 2, 6, 5, 2
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


DEVICE = False
"""Whether new toy executors choose tokens themselves and run ahead, as a GPU does."""


class ToyPipeline:
    """A device that samples: it knows what it was sent and what its own steps left behind, and nothing of the host's lists."""

    depth = 3

    def __init__(self, executor: ToyExecutor, max_draws: int = 8) -> None:
        self.executor, self.max_draws = executor, max_draws
        self.current: ToyFlight | None = None
        self.most_ahead = 0

    def begin(self, step: Step, draws: list[Draw]) -> ToyFlight:
        return ToyFlight(self, copy.deepcopy(step), [(copy.deepcopy(d.sampler), d.row) for d in draws])


class ToyFlight:
    def __init__(self, pipeline: ToyPipeline, step: Step, draws: list[tuple[Sampler, int]]) -> None:
        assert len(draws) <= pipeline.max_draws
        self.pipeline, self.draws = pipeline, draws
        self.tokens: list[list[int]] = []
        self.rows = [list(row[: -(-n // PAGE_SIZE)]) for row, n in zip(step.block_table, step.seq_lens, strict=True)]
        self._run(step)
        if step.logit_rows is None:
            assert [row for _, row in draws] == list(range(len(step.seq_lens)))
            pipeline.current = self

    @property
    def in_flight(self) -> int:
        return len(self.tokens)

    def _run(self, step: Step) -> None:
        logits = self.pipeline.executor.run(step)
        rows = np.arange(len(step.input_ids)) if step.logit_rows is None else step.logit_rows
        tokens = []
        for sampler, row in self.draws:
            try:
                tokens.append(sampler.sample(logits[row], int(step.positions[rows[row]]) + 1))
            except InternalError:
                tokens.append(-1)
        if self.draws:
            self.tokens.append(tokens)
        self.pipeline.most_ahead = max(self.pipeline.most_ahead, len(self.tokens))
        self.step = step

    def again(self, tables: list[list[int]]) -> bool:
        if self.pipeline.current is not self:
            return False
        for known, now in zip(self.rows, tables, strict=True):
            known += now[len(known) :]
        last, ids = self.step, np.maximum(self.tokens[-1] if self.tokens else self.last, 0).astype(np.int32)
        positions = last.positions + 1
        slots = [r[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for r, p in zip(self.rows, positions, strict=True)]
        table = np.zeros((len(ids), max(len(r) for r in self.rows)), np.int32)
        for i, known in enumerate(self.rows):
            table[i, : len(known)] = known
        self._run(Step(ids, positions, np.array(slots, np.int32), last.q_indptr, last.seq_lens + 1, table, None))
        self.pipeline.current = self
        return True

    def collect(self) -> list[int]:
        self.last = self.tokens.pop(0)
        return self.last

    def abandon(self) -> None:
        self.tokens.clear()


class ToyExecutor:
    """Two attention layers over a paged cache, in float64: each row is computed on its own, so batching changes no bit of it."""

    def __init__(self, vocab: int, num_pages: int, sharpness: float = 3.0) -> None:
        rng = np.random.default_rng(11)
        width = 12
        self.num_pages = num_pages
        self.vocab = vocab
        self.embedding = rng.normal(size=(vocab, width))
        self.q = rng.normal(size=(LAYERS, width, HEADS, K_DIM)) / 3
        self.k = rng.normal(size=(LAYERS, width, HEADS, K_DIM)) / 3
        self.v = rng.normal(size=(LAYERS, width, HEADS, V_DIM)) / 3
        self.o = rng.normal(size=(LAYERS, HEADS, V_DIM, width)) / 3
        self.head = rng.normal(size=(width, vocab)) * sharpness / 3
        # garbage, not zeros: a row that reads beyond its sequence must be noticed
        self.keys = np.full((LAYERS, num_pages * PAGE_SIZE, HEADS, K_DIM), np.nan)
        self.values = np.full((LAYERS, num_pages * PAGE_SIZE, HEADS, V_DIM), np.nan)
        self.steps: list[Step] = []
        self.copies = 0
        self.closed = False
        self.pipeline = ToyPipeline(self) if DEVICE else None

    def run(self, step: Step) -> np.ndarray:
        if self.pipeline is not None:
            self.pipeline.current = None
        self.steps.append(step)
        x = self.embedding[step.input_ids] + np.sin(step.positions[:, None] * np.arange(1, 13) / 7)
        for layer in range(LAYERS):
            x = self._layer(layer, x, step)
        rows = np.arange(len(x)) if step.logit_rows is None else step.logit_rows
        return np.stack([row @ self.head for row in x[rows]]).astype(np.float32)

    def _layer(self, layer: int, x: np.ndarray, step: Step) -> np.ndarray:
        for row, slot in zip(x, step.slot_mapping, strict=True):
            self.keys[layer, slot] = np.einsum("w,whd->hd", row, self.k[layer])
            self.values[layer, slot] = np.einsum("w,whd->hd", row, self.v[layer])
        out = np.empty_like(x)
        for s, length in enumerate(step.seq_lens):
            first, last = step.q_indptr[s], step.q_indptr[s + 1]
            slots = [int(step.block_table[s, p // PAGE_SIZE]) * PAGE_SIZE + p % PAGE_SIZE for p in range(length)]
            for row in range(first, last):
                seen = slots[: length - (last - first) + (row - first) + 1]
                assert len(seen) == step.positions[row] + 1
                q = np.einsum("w,whd->hd", x[row], self.q[layer])
                scores = np.einsum("hd,thd->ht", q, self.keys[layer, seen])
                weights = np.exp(scores - scores.max(axis=1, keepdims=True))
                weights /= weights.sum(axis=1, keepdims=True)
                mixed = np.einsum("ht,thd->hd", weights, self.values[layer, seen])
                out[row] = x[row] + np.einsum("hd,hdw->w", mixed, self.o[layer])
        return out

    def copy_page(self, source: int, target: int) -> None:
        self.copies += 1
        a, b = (slice(p * PAGE_SIZE, (p + 1) * PAGE_SIZE) for p in (source, target))
        self.keys[:, b] = self.keys[:, a]
        self.values[:, b] = self.values[:, a]

    def clear_page(self, page: int) -> None:
        slots = slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
        self.keys[:, slots] = self.values[:, slots] = 0

    def close(self) -> None:
        self.closed = True


def reference_logits(vocab: int, tokens: list[int], **options: float) -> np.ndarray:
    """Logits [n, vocab] of the toy decoder with all of ``tokens`` in one step and pages in order."""
    n = len(tokens)
    pages = -(-n // PAGE_SIZE)
    executor = ToyExecutor(vocab, pages, **options)
    ids = np.arange(n, dtype=np.int32)
    step = Step(
        np.array(tokens, np.int32), ids, ids, np.array([0, n], np.int32), np.array([n], np.int32),
        np.arange(pages, dtype=np.int32)[None], ids,
    )  # fmt: skip
    return executor.run(step)


def manifest(vocab: int, context: int, limits: Limits, tokenizer: TokenizerFiles | None = None) -> Manifest:
    """A manifest for the toy decoder."""
    return Manifest(
        llmc="0.1.0",
        tvm="0.27.0.post1",
        model=ModelInfo("toy", "toy", "0", "toy", 0, vocab, context, context),
        kv=KvInfo(PAGE_SIZE, "float32", [KvLayer(HEADS, K_DIM, V_DIM) for _ in range(LAYERS)]),
        limits=limits,
        graph_sha256="",
        options={},
        variants=[],
        tensors={},
        tokenizer=tokenizer,
    )


def toy_model(
    *,
    vocab: int = 40,
    pages: int = 64,
    context: int = 64,
    limits: Limits | None = None,
    folder: Path | None = None,
    tokenizer: TokenizerFiles | None = None,
    sharpness: float = 3.0,
) -> Model:
    """A Model over the toy decoder, with the tokenizer files of ``folder`` if they are given."""
    m = manifest(vocab, context, limits or Limits(4, 16, 8), tokenizer)
    return Model(m, ToyExecutor(vocab, pages, sharpness), folder or Path())


def executor_of(model: Model) -> ToyExecutor:
    executor = model._executor
    assert isinstance(executor, ToyExecutor)
    return executor


def byte_level_tokenizer() -> Tokenizer:
    """A byte-level BPE: all 256 bytes, some merges, ``<s>`` before every text, ``</s>`` as the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ġw", "o"), ("ð", "Ł")]
    tokens = ["<s>", "</s>", *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def sentencepiece_tokenizer() -> Tokenizer:
    """A BPE in sentencepiece's manner: ``▁`` for spaces, one of them in front, and byte fallback (``<0xE4>``)."""
    pieces = ["▁", "a", "b", "c", "▁a", "▁b", "ab", "▁ab", "。", "中"]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b")]
    model = models.BPE({t: i for i, t in enumerate(vocabulary)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer, template: str | None = TEMPLATE) -> TokenizerFiles:
    """Write a tokenizer as an artifact holds it."""
    start, end = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    assert start is not None
    assert end is not None
    (folder / "tokenizer").mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    if template is not None:
        (folder / "tokenizer" / "chat_template.jinja").write_text(template, encoding="utf-8")
    return TokenizerFiles(
        file="tokenizer/tokenizer.json",
        chat_template=None if template is None else "tokenizer/chat_template.jinja",
        bos_token_id=start,
        eos_token_ids=[end],
        pad_token_id=None,
        bos_token="<s>",
        eos_token="</s>",
    )
