"""What a language model must do in an MM-GEM, found out by running it on a few tokens, and not by its name."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from transformers import DynamicCache

PACKINGS = "position_ids", "block_mask", "none"  # of `MMGEMConfig.sequence_packing`, the fastest first
CROSS_ATTENTION = "encoder_hidden_states", "cross_attention_states"
PROBING = "probing"  # in the place of what was checked: the probe runs what would check
NARROW_WINDOW = 4  # what windows of attention are made while a model is probed
LONGEST_WINDOW = 512  # of those that cannot be made narrow, the widest that the sequences of the probe are longer than


def check_text_config(config: Any):
    """What a configuration says by itself.

    Raises:
        ValueError: For an encoder-decoder, and for a model of several modalities.
    """
    if config.is_encoder_decoder:
        raise ValueError(f"`text` is a `{config.model_type}` model, an encoder-decoder; expected a decoder alone.")
    if config.get_text_config(decoder=True) is not config:
        raise ValueError(
            f"`text` is a `{config.model_type}` model, of which text is one part; expected a language model alone."
        )


def probe_language_model(model: Any) -> str:
    """Make sure that the language model of a model can embed and write, and find out how it keeps packed sequences
    apart.

    Args:
        model: An `MMGEMModel`, with weights; afterwards it is as it was.

    Returns:
        The `sequence_packing` of its configuration.

    Raises:
        ValueError: If the language model does not read vectors in the place of tokens, has cross-attention, is not
            causal, has further layers in its head, cannot go on from its cache after a padded prompt, or reads a text
            in a batch otherwise than alone.
    """
    with at_rest(model), _narrow_windows(model):
        probe = _Probe(model)
        _require(model, "reads vectors in the place of tokens (`inputs_embeds`)", probe.reads_vectors)
        _require(model, "has no cross-attention to an encoder", probe.has_no_cross_attention)
        _require(model, "is causal: no token sees a later one", probe.is_causal)
        _require(model, "writes from its cache, for a batch of padded prompts, what it writes alone", probe.generates)
        _require(model, "scores words by its output embeddings alone", probe.scores_linearly)
        _require(model, "reads a text in the same way beside the longest one", probe.keeps_positions)
        failed: Exception | None = None
        for packing in PACKINGS:
            try:
                # Causally in any case, since texts may be read otherwise in another stage of training.
                if all(probe.packs(packing, attention) for attention in {"causal", model.config.text_attention}):
                    return packing
            except Exception as error:  # of whatever kind: it is a model that we know nothing about
                failed = error
        reading = f"reads a text in a batch as alone, with `text_attention` {model.config.text_attention!r}"
        raise _refusal(model, reading, failed) from failed


@torch.compiler.disable
def check_reading(model: Any):
    """Make sure that a model reads texts as its configuration says. Where parameters may be sharded over processes,
    nothing is differentiated, since that would set off their hooks in the middle of a step.

    Args:
        model: An `MMGEMModel`, wrapped or not; afterwards it is as it was. Without weights, on the meta device,
            nothing is checked.

    Raises:
        ValueError: If `sequence_packing` or `text_attention` is not what the language model does.
    """
    if model.embedding_tokens.is_meta:
        return
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    config, failed = model.config, None
    with at_rest(model), _narrow_windows(model):
        try:
            if _Probe(model).packs(config.sequence_packing, config.text_attention, by_gradient=not is_distributed):
                return
        except Exception as error:
            failed = error
    raise ValueError(
        f"`sequence_packing` is {config.sequence_packing!r} and `text_attention` {config.text_attention!r}, which do "
        f"not hold for this `{config.text_config.model_type}` model with `attn_implementation` "
        f"{model.language_model.config._attn_implementation!r}{_reason(failed)}; expected what `from_towers` finds, "
        "such as 'none' and 'causal'."
    ) from failed


class _Probe:
    """Three sequences of vectors, laid out so that one stands behind another, and is longer than a window."""

    def __init__(self, model: Any):
        self.model, self.config = model, model.config
        text_config, words = model.config.text_config, model.get_input_embeddings()
        limit = model.config.max_sequence_length or 10**6
        windows = [width for *_, width in _windows(model) if width <= LONGEST_WINDOW]
        window = max(1, min(max(windows, default=NARROW_WINDOW), (limit - 5) // 2))
        self.lengths = 2 * window + 5, window + 3, window + 1
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(text_config.vocab_size, (sum(self.lengths),), generator=generator)
        with torch.no_grad():
            embeds = words(ids.to(words.weight.device))  # (N, H)
            self.embeds = 0.7 * (embeds + embeds.roll(1, 0))  # (N, H), as large as words but no words
        self.other = self.embeds.flip(0)  # (N, H)
        self.weights = torch.randn(self.embeds.shape, generator=generator).to(self.embeds)  # (N, H)

    def reads_vectors(self) -> bool:
        with torch.no_grad():
            states = self._run(self.embeds)  # (N, H)
        return states.shape == self.embeds.shape and bool(states.isfinite().all())

    @torch.no_grad()
    def keeps_positions(self) -> bool:
        """Frequencies of rotary positions that follow the length of the longest sequence would change the others."""
        limit, decoder = self.config.max_sequence_length, self.model.get_decoder()
        if limit is None or "position_ids" not in signature(decoder.forward).parameters:
            return True
        first = torch.arange(min(limit, 3), device=self.embeds.device)  # (3,)
        embeds = self.embeds[None, : len(first)].expand(2, -1, -1)  # (2, 3, H)
        states = [
            decoder(inputs_embeds=embeds.clone(), position_ids=torch.stack([first, other]), use_cache=False)
            for other in (first, first + limit - len(first))
        ]
        return agree(states[1].last_hidden_state[0], states[0].last_hidden_state[0])

    def has_no_cross_attention(self) -> bool:
        decoder = self.model.get_decoder()
        for name in set(CROSS_ATTENTION) & set(signature(decoder.forward).parameters):
            try:
                with torch.no_grad():
                    states = decoder(
                        inputs_embeds=self.embeds[None], use_cache=False, **{name: self.other[None]}
                    ).last_hidden_state[0]
                    if not agree(states, self._run(self.embeds)):
                        return False
            except RuntimeError:  # an encoder of another width
                return False
            except Exception:  # the model has no use for one, and says so
                continue
        return True

    def is_causal(self) -> bool:
        half = self.lengths[0] // 2
        with torch.no_grad():  # a choice of tokens has no gradient
            changed = self._run(torch.cat([self.embeds[:half], self.other[half:]]))  # (N, H)
            if not agree(changed[:half], self._run(self.embeds)[:half]):
                return False
        gradient = self._gradient(self._run, slice(0, half))  # (N, H)
        return bool(gradient[:half].any()) and not gradient[half:].any()

    @torch.no_grad()
    def scores_linearly(self) -> bool:
        """The logits of the caption loss are those of the language model, which its `generate` reads."""
        embeds = self._split()[0]
        logits = self.model(inputs_embeds=embeds[None].clone()).logits[0]  # (L, V)
        return agree(self.model._vocabulary_logits(self.model._run_decoder(embeds[None].clone())[0]), logits)

    @torch.no_grad()
    def generates(self) -> bool:
        """One token after prompts that are padded on the left, as `generate` goes about it."""
        rows = self._split()[1:]
        longest = max(map(len, rows))
        padded = torch.stack([torch.cat([self.other[: longest - len(row)], row]) for row in rows])  # (2, L, H)
        mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()  # (2, L)
        mask = mask.to(padded.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)  # (2, L)
        has_cache = self.model._supports_default_dynamic_cache()
        cache = DynamicCache(config=self.config.get_text_config(decoder=True)) if has_cache else None
        prompt = self._written(padded[:, :-1], mask[:, :-1], positions[:, :-1], cache)
        if prompt.past_key_values is None:
            return False
        logits = self._written(padded[:, -1:], mask, positions[:, -1:], prompt.past_key_values).logits[:, -1]
        alone = [self.model(inputs_embeds=row[None].clone()).logits[0, -2:] for row in rows]
        return all(
            agree(torch.stack([before, after]), expected)
            for before, after, expected in zip(prompt.logits[:, -1], logits, alone, strict=True)
        )

    def _written(self, inputs_embeds, attention_mask, position_ids, past_key_values):
        return self.model(
            inputs_embeds=inputs_embeds.clone(),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=True,
        )

    def packs(self, packing: str, text_attention: str, by_gradient: bool = True) -> bool:
        """Whether the sequences, run together, are what they are alone, and the last depends on none of the others."""
        config = self.config
        before = config.sequence_packing, config.text_attention
        config.sequence_packing, config.text_attention = packing, text_attention
        try:
            with torch.no_grad():
                together = self._packed(self.embeds)  # (N, H)
            if not all(map(agree, together.split(self.lengths), self._alone())):
                return False
            last = self.lengths[-1]
            if not by_gradient:
                embeds = torch.cat([self.other[:-last], self.embeds[-last:]])  # (N, H)
                with torch.no_grad():
                    changed = self._packed(embeds)  # (N, H)
                return agree(changed[-last:], together[-last:], 8 * torch.finfo(embeds.dtype).eps)
            gradient = self._gradient(self._packed, slice(-last, None))  # (N, H)
            if gradient[:-last].any() or not gradient[-last:].any():
                return False
            looks_ahead = self._gradient(self._packed, slice(-last, 1 - last))[-1].any()
            return bool(looks_ahead) == (text_attention == "bidirectional")
        finally:
            config.sequence_packing, config.text_attention = before

    def _packed(self, embeds: torch.Tensor) -> torch.Tensor:
        """(N, H) -> (N, H), as a joint step does it."""
        lengths = torch.tensor(self.lengths, device=embeds.device)
        blocks = torch.arange(len(lengths), device=embeds.device).repeat_interleave(lengths)  # (N,)
        is_bidirectional = self.config.text_attention == "bidirectional"
        return self.model._run_packed(embeds, lengths, blocks if is_bidirectional else torch.full_like(blocks, -1))

    def _run(self, embeds: torch.Tensor, bidirectional: torch.Tensor | None = None) -> torch.Tensor:
        """(N, H) -> (N, H), as one text, with (1, N) blocks to read it both ways."""
        return self.model._run_decoder(embeds[None].clone(), bidirectional=bidirectional)[0]

    @torch.no_grad()
    def _alone(self) -> list[torch.Tensor]:
        is_bidirectional = self.config.text_attention == "bidirectional"
        blocks = torch.zeros(1, len(self.embeds), dtype=torch.long, device=self.embeds.device)
        return [self._run(embeds, blocks[:, : len(embeds)] if is_bidirectional else None) for embeds in self._split()]

    def _split(self) -> tuple[torch.Tensor, ...]:
        return self.embeds.split(self.lengths)

    def _gradient(self, run: Callable[[torch.Tensor], torch.Tensor], chosen: slice) -> torch.Tensor:
        """(N, H), of the states `chosen` by all vectors: exactly 0 where nothing is seen, in every dtype."""
        embeds = self.embeds.clone().requires_grad_()
        states = run(embeds.clone())  # (N, H); some models scale their inputs in place
        return torch.autograd.grad((states * self.weights)[chosen].sum(), embeds)[0]


def agree(found: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> bool:
    """Equal but for the rounding of many layers, which is far less than half the digits. NaN agrees with nothing."""
    tolerance = torch.finfo(expected.dtype).eps ** 0.5 if tolerance is None else tolerance
    found, expected = found.float(), expected.float()
    return bool((found - expected).norm() <= tolerance * expected.norm())


def _windows(model: Any) -> list[tuple[dict, str, int]]:
    """The widths of windows and chunks of attention that a language model holds: in which object, and by which name.

    Masks are made from its configurations; its modules hand them to kernels.
    """
    modules = list(model.get_decoder().modules())
    configs = [model.config.text_config, *(module.config for module in modules if hasattr(module, "config"))]
    holders = {id(holder): vars(holder) for holder in (*modules, *configs)}
    return [
        (holder, name, value)
        for holder in holders.values()
        for name, value in holder.items()
        if ("window" in name or "attention_chunk" in name) and type(value) is int and value >= NARROW_WINDOW
    ]


@contextmanager
def _narrow_windows(model: Any) -> Iterator[None]:
    """Within, windows of attention are narrow, so that short sequences are longer than any of them. Those of real
    models are of thousands of tokens. Where that has no effect, the windows stay as they are."""
    windows, probe = _windows(model), _Probe(model)
    short = probe.embeds[: 3 * NARROW_WINDOW]  # (L, H)

    def restore():
        for holder, name, width in windows:
            holder[name] = width

    try:
        with torch.no_grad():
            before = probe._run(short)  # (L, H)
            for holder, name, _ in windows:
                holder[name] = NARROW_WINDOW
            if agree(probe._run(short), before):
                restore()
    except Exception:  # of a model that we know nothing about, and that the probe will name
        restore()
    try:
        yield
    finally:
        restore()


@contextmanager
def at_rest(model: Any):
    """Without dropout, autocast or inference mode. No random number is drawn from the global generators."""
    training = [module for module in model.modules() if module.training]
    checked, model._checked_reading = model._checked_reading, PROBING
    for module in training:
        module.training = False
    device_type = model.embedding_tokens.device.type
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device_type, enabled=False):
            yield
    finally:
        model._checked_reading = checked
        for module in training:
            module.training = True


def _require(model: Any, what: str, holds: Callable[[], bool]):
    try:
        if holds():
            return
    except Exception as error:
        raise _refusal(model, what, error) from error
    raise _refusal(model, what, None)


def _refusal(model: Any, what: str, error: Exception | None) -> ValueError:
    model_type = model.config.text_config.model_type
    return ValueError(f"`text` is a `{model_type}` model{_reason(error)}; expected a language model that {what}.")


def _reason(error: Exception | None) -> str:
    return "" if error is None else f" (it raised {type(error).__name__}: {str(error).splitlines()[0][:200]})"
