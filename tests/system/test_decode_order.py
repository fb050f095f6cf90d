"""A decoder takes its slots in order, the last may repeat; a caller's autocast changes no token."""

from __future__ import annotations

import pytest
import torch

import dalle_ext
from dalle.errors import UsageError
from dalle.prior.decode import Decoder
from support.prior import make, sample

KINDS = ("row", "column", "conv", "causal")


def previous(image, slot, samples=2):
    return image[:, slot - 1, None].expand(-1, samples) if slot else None


@pytest.mark.parametrize("given", [0, 1, 5])
def test_a_slot_out_of_order_is_refused_and_changes_nothing(given):
    model = make(attention=KINDS, num_layers=4)
    text, image = sample(model, batch=2)
    plain, tried = Decoder(model, 2, 2), Decoder(model, 2, 2)
    for _ in range(2):  # the second time the order starts anew with the captions
        for decoder in (plain, tried):
            decoder.set_text(text, image[:, :given])
        for slot in range(given, 12):
            near = str(slot) if slot == given else f"{slot - 1} or {slot}"
            line = f"^Decoder: slot must be {near}, slots come in order, got "
            for wrong in {*range(12)} - {slot} - ({slot - 1} if slot > given else set()):
                with pytest.raises(UsageError, match=f"{line}{wrong}$"):
                    tried.step(wrong, previous(image, wrong))
            wanted = plain.step(slot, previous(image, slot))
            assert torch.equal(tried.step(slot, previous(image, slot)), wanted)


@pytest.mark.parametrize("bits", [None, 8])
def test_the_last_slot_may_come_again_with_other_tokens(bits):
    """As if only the last call had been made, in rings too that have gone round."""
    model = make(attention=KINDS, num_layers=4)
    text, image = sample(model, batch=2)
    plain, again = (Decoder(model, 2, 2, cache_bits=bits) for _ in range(2))
    for decoder in (plain, again):
        decoder.set_text(text, image[:, :1])
    for slot in range(1, 12):
        again.step(slot, (previous(image, slot) + 3) % 7)
        found = again.step(slot, previous(image, slot))
        assert torch.equal(found, plain.step(slot, previous(image, slot)))
    with pytest.raises(UsageError, match="^Decoder: slot must be 11, slots come in order, got 10$"):
        again.step(10, previous(image, 10))


@pytest.mark.parametrize("reference", [False, True])
def test_a_callers_autocast_changes_no_token(reference):
    model = make(image_rank=6)
    text, _ = sample(model)
    with dalle_ext.use_reference(reference):
        wanted = model.generate(text, num_samples=2, seed=5)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model.generate(text, num_samples=2, seed=5), wanted)
