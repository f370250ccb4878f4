"""`tw.generate`: text from a causal language model of `transformers` that lives on a slice.

The prompt is one compiled function, which fills a static key-value cache; each further token is a turn of a `tw.scan`
over another, which updates the cache in place. A chunk of tokens is dispatched in one message an island, before those
of the chunk before are there, and nothing is read until the end but whether all rows have ended, once a chunk.
"""

from __future__ import annotations

import inspect
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree

from torchways.array import Array
from torchways.capture.host_content import HostContent
from torchways.controller.beams import Beams, beam_results, next_beams
from torchways.controller.buffers import HostBuffer
from torchways.controller.function import make_function
from torchways.controller.logits import Processors, TokenChoice, Tokens
from torchways.controller.modules import ENTRY
from torchways.controller.scan import loop_in_python, run_scan
from torchways.controller.session import Session
from torchways.errors import ShapeError, UserError
from torchways.mesh import DATA_AXIS, VirtualSlice
from torchways.parallel.replicate import replicas_of

#: The cache's length is a multiple of this, so that prompts of about one length share the compiled decoding step.
_CACHE_STEP = 64
#: The least that prompts are padded to.
_SHORTEST_PROMPT = 16
#: Ways to choose tokens whose compiled functions a model keeps.
_MAX_DECODERS = 8
_DECODERS = "_torchways_decoders"

#: Keys and values of each layer, [batch, heads, length, head dimension].
_Cache = list[tuple[torch.Tensor, torch.Tensor]]


class _Prompt(NamedTuple):
    """What the prefill gets: token ids and mask as long as the cache, and the prompt's positions."""

    ids: torch.Tensor
    mask: torch.Tensor
    position_ids: torch.Tensor
    uniform: torch.Tensor | None
    first: torch.Tensor | None
    too_short: torch.Tensor | None
    beams: Beams | None


class _State(NamedTuple):
    """What a decoding step gives to the next; [batch, cache length] is the shape of `ids` and `mask`.

    Attributes:
        ids: all tokens so far.
        mask: 1 for each token that counts.
        token: the last one, [batch].
        finished: which rows have ended, [batch].
        position_ids: position of `token` in its row, [batch, 1].
        cache_position: where in the cache it goes, [1].
        length: how many tokens were added until all rows had ended, [1].
        first: where in the cache the prompt begins, [1]; None where nothing asks.
        too_short: how many tokens are to be added before a row may end, [1]; None where there is no such limit.
        beams: of a beam search, whose rows are the running beams.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    token: torch.Tensor
    finished: torch.Tensor
    position_ids: torch.Tensor
    cache_position: torch.Tensor
    length: torch.Tensor
    first: torch.Tensor | None
    too_short: torch.Tensor | None
    beams: Beams | None


class _Decoder:
    """The compiled functions of a model for one way to choose tokens: bodies of loops."""

    def __init__(
        self,
        model: Any,
        choice: TokenChoice,
        mesh: VirtualSlice | None,
        get_session: Callable[[], Session] | None,
    ) -> None:
        self._model = model
        self._choice = choice
        self.processors = Processors(choice, model)
        self.parameters = inspect.signature(type(model).forward).parameters
        self.prefill: Callable[..., Any] = self._prefill
        self.decode: Callable[..., Any] = self._decode
        if (
            mesh is not None and get_session is not None
        ):  # all of a step, and not only the model's call, is one function
            self.prefill = make_function(self._prefill, mesh, get_session)
            self.decode = make_function(self._decode, mesh, get_session)

    def _prefill(self, cache: _Cache, prompt: _Prompt) -> tuple[_Cache, tuple[_State, Any]]:
        batch, length = prompt.position_ids.shape
        positions = torch.arange(length)
        scores, cache = self._forward(prompt.ids[:, :length], prompt.mask, prompt.position_ids, positions, cache)
        state = _State(
            ids=prompt.ids,
            mask=prompt.mask.clone(),  # of this function, and not a copy of an argument beside it
            token=prompt.ids[:, 0],
            finished=torch.zeros(batch, dtype=torch.bool),
            position_ids=prompt.position_ids[:, -1:],
            cache_position=positions[-1:],
            length=torch.zeros(1, dtype=torch.int64),
            first=None if prompt.first is None else prompt.first.clone(),
            too_short=None if prompt.too_short is None else prompt.too_short.clone(),
            beams=None if prompt.beams is None else Beams(*(part.clone() for part in prompt.beams)),
        )
        state, y = self._next(state, scores, prompt.uniform, is_first=True)
        return _reordered(cache, state), (state, y)

    def _decode(self, carry: tuple[_State, _Cache], uniform: torch.Tensor | None) -> tuple[tuple[_State, _Cache], Any]:
        state, cache = carry
        scores, cache = self._forward(state.token[:, None], state.mask, state.position_ids, state.cache_position, cache)
        state, y = self._next(state, scores, uniform)
        return (state, _reordered(cache, state)), y

    def _forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        position_ids: torch.Tensor,
        cache_position: torch.Tensor,
        cache: _Cache,
    ) -> tuple[torch.Tensor, _Cache]:
        """Returns the scores of the token that follows, [batch, vocabulary], float32, and the new cache."""
        held = _transformers_cache(cache)
        given = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": position_ids,
            "cache_position": cache_position,
            "past_key_values": held,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        output = self._model(**{name: value for name, value in given.items() if name in self.parameters})
        return output.logits[:, -1].float(), [(layer.keys, layer.values) for layer in held.layers]

    def _next(
        self, state: _State, scores: torch.Tensor, uniform: torch.Tensor | None, *, is_first: bool = False
    ) -> tuple[_State, Any]:
        choice, processors = self._choice, self.processors
        seen = Tokens(state.ids, state.cache_position, state.first)
        if choice.beams is not None:
            scores = scores.log_softmax(-1)
        scores = processors.scores(seen, scores, state.too_short, is_first=is_first)
        cache_position = state.cache_position + 1
        state = state._replace(
            position_ids=state.position_ids + 1,
            too_short=None if state.too_short is None else state.too_short - 1,
        )
        if choice.beams is not None:
            assert state.beams is not None
            beams, ids = next_beams(choice.beams, processors, state.beams, seen, scores, len(choice.eos_token_ids))
            token = ids.index_select(1, cache_position)[:, 0]
            return state._replace(ids=ids, token=token, cache_position=cache_position, beams=beams), beams.is_over.all()
        token = scores.argmax(-1) if uniform is None else draw(scores, uniform)
        if processors.pads:
            token = torch.where(state.finished, choice.pad_token_id, token)
        ids = state.ids.index_copy(1, cache_position, token[:, None])
        finished = processors.finished(Tokens(ids, cache_position, state.first), token, state.finished)
        state = state._replace(
            ids=ids,
            token=token,
            finished=finished,
            cache_position=cache_position,
            length=state.length + (~state.finished.all()).to(torch.int64),
        )
        has_ended = finished.all() if processors.ends else None
        if choice.streams:
            return state, token if has_ended is None else torch.cat([token, has_ended[None].to(torch.int64)])
        return state, has_ended


def _reordered(cache: _Cache, state: _State) -> _Cache:
    """Returns the rows of a cache that the next step's beams go on from."""
    if state.beams is None:
        return cache
    origin = state.beams.origin
    return [(keys.index_select(0, origin), values.index_select(0, origin)) for keys, values in cache]


def draw(scores: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draws a token for each row, by the inverse of the cumulative distribution.

    Args:
        scores: unnormalized log probabilities, [batch, vocabulary].
        uniform: random numbers from [0, 1), [batch].

    Returns:
        token ids, [batch], int64.
    """
    cumulative = scores.softmax(-1).cumsum(-1)
    threshold = uniform[:, None] * cumulative[:, -1:]
    return (cumulative <= threshold).sum(-1).clamp(max=scores.shape[-1] - 1)


def run_generate(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    max_new_tokens: int,
    choice: TokenChoice,
    generator: torch.Generator | None,
    streamer: Any,
    tokens_per_dispatch: int,
    get_session: Callable[[], Session] | None,
) -> torch.Tensor:
    """See `tw.generate`; `get_session` is None where all runs eagerly."""
    ids, mask = _check(model, input_ids, attention_mask, max_new_tokens, tokens_per_dispatch, get_session)
    batch, given_length = ids.shape
    mesh = None if get_session is None else getattr(model, ENTRY).mesh
    decoder = _decoder(model, choice, mesh, get_session)
    # A model that is not told the positions of tokens would count what is padded.
    padding = _padding(model, given_length, max_new_tokens) if "position_ids" in decoder.parameters else 0
    given = ids
    processors = decoder.processors
    min_new_tokens = choice.min_new_tokens(given_length)
    ids = torch.nn.functional.pad(ids, (padding, 0), value=choice.pad_token_id)
    mask = torch.nn.functional.pad(mask, (padding, 0))
    prompt_length = given_length + padding
    cache_length = math.ceil((prompt_length + max_new_tokens) / _CACHE_STEP) * _CACHE_STEP
    room = (0, cache_length - prompt_length)
    uniforms = torch.rand(max_new_tokens, batch, generator=generator) if choice.do_sample else None
    filled = torch.nn.functional.pad(ids, room, value=choice.fill)
    search = choice.beams
    prompt = _Prompt(
        ids=filled,
        mask=torch.nn.functional.pad(mask, room, value=1),
        position_ids=(mask.cumsum(-1) - 1).masked_fill(mask == 0, 1),
        uniform=uniforms[0] if uniforms is not None else None,
        first=torch.tensor([padding]) if processors.read_tokens else None,
        too_short=torch.tensor([min_new_tokens]) if choice.eos_token_ids and choice.has_min_length else None,
        beams=None if search is None else Beams.first(filled, search.num_beams, max_new_tokens),
    )
    run = _Generation(decoder, get_session)
    run.start(_empty_cache(model, batch, cache_length, mesh, is_eager=get_session is None), prompt)
    processors.check_prompt(given_length)
    if streamer is not None:
        streamer.put(given)
    for ys in run.chunks(uniforms, max_new_tokens, tokens_per_dispatch):
        if _has_ended(ys, streamer, batch, ends=processors.ends):
            break
    if streamer is not None:
        streamer.end()
    if search is not None:
        assert run.state.beams is not None
        return beam_results(search, run.state.beams, padding, given_length)
    num_new = int(run.state.length.cpu()) if processors.ends else max_new_tokens
    return run.state.ids.cpu()[:, padding : padding + given_length + num_new]


def _padding(model: Any, length: int, max_new_tokens: int) -> int:
    """Returns by how much prompts of this length are padded on the left, so that they share a compiled prefill.

    They are padded to one of at most four lengths between two powers of two; not at all where that leaves no room.
    """
    step = max(_SHORTEST_PROMPT, 1 << max(0, (length - 1).bit_length() - 3))
    padded = math.ceil(length / step) * step
    limit = _position_limit(model)
    return padded - length if limit is None or padded + max_new_tokens <= limit else 0


def _position_limit(model: Any) -> int | None:
    """Returns how many positions a model has; None: any number."""
    limit: int | None = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit


class _Generation:
    """One call of `tw.generate`: what was dispatched last."""

    state: _State

    def __init__(self, decoder: _Decoder, get_session: Callable[[], Session] | None) -> None:
        self._decoder = decoder
        self._get_session = get_session
        self._cache: _Cache = []
        self._first: Any = None

    def start(self, cache: _Cache, prompt: _Prompt) -> None:
        """Dispatches the prompt."""
        xs = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor[None], prompt)
        self._cache, [(self.state, self._first)] = self._scan(self._decoder.prefill, cache, xs, 1)

    def chunks(self, uniforms: torch.Tensor | None, num_tokens: int, size: int) -> Iterator[list[Any]]:
        """Yields what the turns of each chunk gave; the chunk after it is dispatched already."""
        waiting = deque([[self._first]])
        for begin in range(1, num_tokens, size):
            count = min(size, num_tokens - begin)
            xs = None if uniforms is None else uniforms[begin : begin + count]
            (self.state, self._cache), ys = self._scan(self._decoder.decode, (self.state, self._cache), xs, count)
            waiting.append(ys)
            if len(waiting) > 1:
                yield waiting.popleft()
        yield from waiting

    def _scan(self, body: Callable[..., Any], init: Any, xs: Any, length: int) -> tuple[Any, list[Any]]:
        if self._get_session is None:
            with torch.no_grad():
                return loop_in_python(body, init, xs, length)
        return run_scan(body, init, xs, length, None, True, self._get_session)


def _has_ended(ys: Sequence[Any], streamer: Any, batch: int, *, ends: bool) -> bool:
    """Waits for what the turns of a chunk gave: hands tokens on, and returns whether all rows have ended."""
    if streamer is None:
        return ends and bool(ys[-1])
    for y in ys:
        read = y.cpu()
        streamer.put(read[:batch])
        if ends and read[batch]:
            return True
    return False


def _decoder(
    model: Any, choice: TokenChoice, mesh: VirtualSlice | None, get_session: Callable[[], Session] | None
) -> _Decoder:
    """Returns the model's decoder for a choice; it is kept with the model, with what was traced for it."""
    decoders: dict[Any, _Decoder] = model.__dict__.setdefault(_DECODERS, {})
    if (choice, mesh) not in decoders:
        if len(decoders) >= _MAX_DECODERS:
            del decoders[next(iter(decoders))]
        decoders[choice, mesh] = _Decoder(model, choice, mesh, get_session)
    return decoders[choice, mesh]


def _transformers_cache(cache: _Cache) -> Any:
    """Returns a cache of transformers' with copies of these tensors, which the model writes to.

    All layers are static ones of full length; the sliding windows of models that have some are left to their masks.
    """
    from transformers.cache_utils import Cache, StaticLayer

    layers: list[Any] = []
    for keys, values in cache:
        layer = StaticLayer(max_cache_len=keys.shape[2])
        layer.lazy_initialization(keys)
        layer.keys, layer.values = keys.clone(), values.clone()
        layers.append(layer)
    return Cache(layers=layers)


def _empty_cache(model: Any, batch: int, length: int, mesh: VirtualSlice | None, *, is_eager: bool) -> _Cache:
    """Returns zeros for keys and values, split over the batch on the axis "dp" and over heads on all others."""
    config = model.config.get_text_config(decoder=True)
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (batch, num_heads, length, head_dim)
    dtype = next(model.parameters()).dtype

    def zeros() -> torch.Tensor:
        if is_eager:
            return torch.zeros(shape, dtype=dtype)
        buffer = HostBuffer(HostContent(shape, dtype, 0.0))
        if mesh is not None:
            dims = [0 if name == DATA_AXIS else 1 for name in mesh.mesh_dim_names]
            texts = [f"S({dim})" if shape[dim] % size == 0 else "R" for dim, size in zip(dims, mesh.shape, strict=True)]
            buffer = HostBuffer(buffer.value, mesh=mesh.root, placements=tuple(texts))
        return Array(buffer, shape, dtype)

    return [(zeros(), zeros()) for _ in range(config.num_hidden_layers)]


def _check(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    max_new_tokens: int,
    tokens_per_dispatch: int,
    get_session: Callable[[], Session] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Refuses what cannot be generated from; returns the prompt and its mask, int64 on the host."""
    name = type(model).__name__
    config: Any = getattr(model, "config", None)
    if not isinstance(model, torch.nn.Module) or not hasattr(config, "get_text_config"):
        raise UserError(f"tw.generate takes a causal language model of transformers, not {name}")
    if get_session is not None and not hasattr(model, ENTRY):
        raise UserError(
            f"{name} is on no slice: place it with tw.function(model, mesh=...) or tw.parallelize_module before "
            "tw.generate"
        )
    if get_session is not None and replicas_of(model) > 1:
        raise UserError(
            f"{name} is replicated, and tw.generate takes no replicas: place a copy of it with tw.parallelize_module"
        )
    if input_ids.dim() != 2 or 0 in input_ids.shape or input_ids.dtype not in (torch.int64, torch.int32):
        dtype = str(input_ids.dtype).removeprefix("torch.")
        raise ShapeError(f"input_ids must be int64[batch, length], not {dtype}{list(input_ids.shape)}")
    ids = input_ids.cpu().to(torch.int64)
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask.cpu().to(torch.int64)
    if mask.shape != ids.shape:
        raise ShapeError(
            f"attention_mask has shape {list(mask.shape)}, but input_ids {list(ids.shape)}: they must be the same"
        )
    if not mask[:, -1].all():
        raise UserError("attention_mask ends with 0: pad prompts on the left (tokenizer.padding_side = 'left')")
    if max_new_tokens < 1 or tokens_per_dispatch < 1:
        raise UserError(
            f"max_new_tokens={max_new_tokens} and tokens_per_dispatch={tokens_per_dispatch} must be at least 1"
        )
    limit = _position_limit(model)
    if limit is not None and ids.shape[1] + max_new_tokens > limit:
        raise UserError(
            f"a prompt of {ids.shape[1]} tokens and max_new_tokens={max_new_tokens} are more than the {limit} "
            f"positions of {name} (max_position_embeddings): at most {max(0, limit - ids.shape[1])} new tokens fit"
        )
    return ids, mask
