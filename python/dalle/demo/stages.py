"""The demo's stages up to sampling; each leaves files and does nothing where they are there."""

from __future__ import annotations

import random

import torch

from dalle.data.augment import to_tensor
from dalle.demo import tiles
from dalle.demo.context import SHOWN, Demo
from dalle.demo.score import score_reconstructions
from dalle.dvae.model import DiscreteVAE
from dalle.files import saving
from dalle.pipeline import write_config
from dalle.prior.model import Prior
from dalle.ranker.model import ContrastiveRanker
from dalle.tokenizer import Tokenizer
from dalle.train.dvae import DvaeTask
from dalle.train.prior import PriorTask
from dalle.train.ranker import RankerTask
from dalle.train.seeds import start_seed

CANDIDATES = 64  # of a caption, for `dalle sample`; the demo's own scores take fewer


def data_stage(demo: Demo) -> None:
    """Loads or draws the pairs, counts them, and shows some."""
    pairs = demo.train_pairs
    indices = random.Random(demo.seed).sample(range(len(pairs)), min(SHOWN, len(pairs)))
    images = to_tensor([pairs.load(i) for i in indices])
    tiles.save_sheet(demo.space.out / "pictures" / "training.png", images[:, None])
    captions = {"captions": [pairs.captions[i] for i in indices]}
    demo.space.write(demo.space.work / "training.json", captions)
    demo.space.add_scores(
        {
            "data": {
                "pairs": len(pairs),
                "different_captions": len(set(pairs.captions)),
                "unseen_pairs": sum(len(p) for p in demo.unseen),
                "image_size": demo.recipe.image_size,
                "skipped": dict(pairs.skipped),
            }
        }
    )


def tokenizer_stage(demo: Demo) -> None:
    """Trains the BPE on the training captions."""
    if demo.space.trained("tokenizer"):
        return
    tokenizer = Tokenizer.train(demo.train_pairs.captions, vocab_size=demo.recipe.vocab_size)
    with saving("demo", demo.space.pipeline / "tokenizer"):
        tokenizer.save_pretrained(demo.space.pipeline / "tokenizer")


def dvae_stage(demo: Demo) -> None:
    """Trains the discrete VAE and scores its reconstructions of unseen pictures."""
    if not demo.space.trained("vae"):
        torch.manual_seed(start_seed(demo.seed, "dvae"))
        vae = DiscreteVAE(demo.recipe.vae).to(demo.device)
        task = DvaeTask(vae, demo.train_pairs, demo.recipe.vae_train, seed=demo.seed)
        demo.train(task, demo.recipe.vae_steps)
    if "psnr" not in demo.space.read_scores():
        score_reconstructions(demo)


def ranker_stage(demo: Demo) -> None:
    """Trains the contrastive ranker on pictures as the dVAE gives them back."""
    if demo.space.trained("ranker"):
        return
    tokenizer = demo.tokenizer
    torch.manual_seed(start_seed(demo.seed, "ranker"))
    ranker = ContrastiveRanker.from_preset(
        "tiny", tokenizer=tokenizer, image_size=demo.recipe.image_size, **demo.recipe.ranker
    ).to(demo.device)
    task = RankerTask(
        ranker,
        demo.train_pairs,
        demo.recipe.ranker_train,
        demo.vae,
        steps=demo.recipe.ranker_steps,
        seed=demo.seed,
    )
    demo.train(task, demo.recipe.ranker_steps)


def prior_stage(demo: Demo) -> None:
    """Trains the transformer on captions and codes."""
    if not demo.space.trained("prior"):
        sizes = demo.recipe.prior_config(demo.tokenizer, demo.vae)
        torch.manual_seed(start_seed(demo.seed, "prior"))  # loading models may draw numbers
        prior = Prior(sizes).to(demo.device)
        task = PriorTask(
            prior,
            demo.tokenizer,
            demo.vae,
            demo.train_pairs,
            demo.recipe.prior_train,
            seed=demo.seed,
        )
        demo.train(task, demo.recipe.prior_steps)
    write_config(
        demo.space.pipeline,
        ranker=True,
        sampling=demo.recipe.sampling,
        num_candidates=CANDIDATES,
    )
