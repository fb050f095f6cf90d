"""The demo's stages up to sampling; each leaves files and does nothing where they are there."""

from __future__ import annotations

import random

import torch

from dalle.data.pairs import all_captions
from dalle.demo import tiles
from dalle.demo.context import SHOWN, Demo
from dalle.demo.score import images_of, score_codes
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


def data_stage(demo: Demo) -> None:
    """Loads or draws the pairs, counts them, and shows some."""
    pairs = demo.data.train
    indices = random.Random(demo.seed).sample(range(len(pairs)), min(SHOWN, len(pairs)))
    images, shown = images_of(demo, indices)
    tiles.save_sheet(demo.space.out / "pictures" / "training.png", images[:, None])
    captions = {"captions": [pairs.captions[i] for i in shown]}
    demo.space.write(demo.space.work / "training.json", captions)
    skipped = pairs.skipped
    for part in demo.data.unseen:  # a folder's two parts each count what was left out before
        skipped = skipped | part.skipped
    demo.space.add_scores(
        {
            "data": {
                "pairs": len(pairs),
                "different_captions": len(set(pairs.captions)),
                "unseen_pairs": sum(len(p) for p in demo.data.unseen),
                "image_size": demo.recipe.image_size,
                "skipped": dict(skipped),
            }
        }
    )


def tokenizer_stage(demo: Demo) -> None:
    """Trains the BPE on the training captions."""
    if demo.space.trained("tokenizer"):
        return
    tokenizer = Tokenizer.train(all_captions(demo.data.train), vocab_size=demo.recipe.vocab_size)
    with saving(demo.space.command, demo.space.pipeline / "tokenizer"):
        tokenizer.save_pretrained(demo.space.pipeline / "tokenizer")


def dvae_stage(demo: Demo) -> None:
    """Trains the discrete VAE and scores its reconstructions of unseen pictures; one that is ready
    is kept in the pipeline, and its codes are counted."""
    if demo.data.vae is not None:
        if not demo.space.trained("vae"):
            with saving(demo.space.command, demo.space.pipeline / "vae"):
                demo.data.vae.save_pretrained(demo.space.pipeline / "vae")
    elif not demo.space.trained("vae"):
        assert demo.recipe.vae_train is not None
        torch.manual_seed(start_seed(demo.seed, "dvae"))
        vae = DiscreteVAE(demo.recipe.vae).to(demo.device)
        vae.train_precision = demo.precision
        task = DvaeTask(
            vae,
            demo.data.train,
            demo.recipe.vae_train,
            seed=demo.seed,
            validation=demo.data.unseen[0],
        )
        demo.train(task, demo.recipe.vae_steps)
    if "code_use" not in demo.space.read_scores():
        score_codes(demo)


def ranker_stage(demo: Demo) -> None:
    """Trains the contrastive ranker on pictures, most of them as the dVAE gives them back."""
    if demo.space.trained("ranker"):
        return
    tokenizer = demo.tokenizer
    torch.manual_seed(start_seed(demo.seed, "ranker"))
    ranker = ContrastiveRanker.from_preset(
        "tiny", tokenizer=tokenizer, image_size=demo.recipe.image_size, **demo.recipe.ranker
    ).to(demo.device)
    ranker.train_precision = demo.precision
    pairs, unseen = demo.data.for_ranker
    task = RankerTask(
        ranker,
        pairs,
        demo.recipe.ranker_train,
        demo.vae if demo.data.splice_codes else None,
        steps=demo.recipe.ranker_steps,
        seed=demo.seed,
        validation=unseen,
    )
    scores = demo.train(task, demo.recipe.ranker_steps)
    demo.space.add_scores({f"ranker_{name}": score for name, score in scores.items()})


def prior_stage(demo: Demo) -> None:
    """Trains the transformer on captions and codes."""
    if not demo.space.trained("prior"):
        sizes = demo.recipe.prior_config(demo.tokenizer, demo.vae, demo.precision)
        torch.manual_seed(start_seed(demo.seed, "prior"))  # loading models may draw numbers
        prior = Prior(sizes).to(demo.device)
        task = PriorTask(
            prior,
            demo.tokenizer,
            demo.vae,
            demo.data.train,
            demo.recipe.prior_train,
            seed=demo.seed,
            validation=demo.data.unseen[0],
        )
        scores = demo.train(task, demo.recipe.prior_steps)
        demo.space.add_scores({f"prior_{name}": score for name, score in scores.items()})
    write_config(
        demo.space.pipeline,
        ranker=True,
        sampling=demo.recipe.sampling,
        num_candidates=demo.recipe.num_candidates,
    )
