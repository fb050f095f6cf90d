"""From a caption to pictures: sample codes, decode them, score them, keep the best (paper 2.6).

Shape letters: B captions, N candidates of each, k kept, h x w code grid, H = W side in pixels.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Unpack, overload

import torch

from dalle.candidates import (
    CandidateFinished,
    DrawOptions,
    Event,
    Finished,
    Generation,
    Request,
    RowsFinished,
    SampleOptions,
    choose,
    counted,
)
from dalle.configs import UPPER_LIMITS, check_numbers, check_options, from_dict, integer
from dalle.devices import without_autocast
from dalle.dvae.model import DiscreteVAE
from dalle.editing import Editing, picture
from dalle.errors import CheckpointError, UsageError
from dalle.files import to_json, write_atomic
from dalle.pretrained import FORMAT_VERSION, fingerprint, read_head
from dalle.prior.decode import Drawn, draw_parts
from dalle.prior.model import Prior
from dalle.prior.sampling import (
    MAX_BATCH,
    MAX_SEED,
    PAPER,
    SamplingChanges,
    SamplingConfig,
    first_numbers,
)
from dalle.prior.step import fitting
from dalle.ranker.model import ContrastiveRanker, ImageTextRanker, load_ranker
from dalle.tokenizer import Tokenizer
from dalle.version import __version__

MAX_CANDIDATES = int(UPPER_LIMITS["num_candidates"])
CANDIDATES, TOP = 512, 8  # where nothing is said: the paper's 512
SEQUENCES = MAX_BATCH  # sampled or decoded at once, at most

__all__ = ["CandidateFinished", "Event", "Finished", "Generation", "Pipeline", "RowsFinished"]


class GenerateOptions(DrawOptions, total=False):
    """Keyword arguments of `Pipeline.generate` and `Pipeline.stream`."""

    prime_image: torch.Tensor | None
    prime_rows: int


class Pipeline(Editing):
    """Tokenizer, discrete VAE, prior and, where there is one, a ranker.

    Args:
        tokenizer: of the prior's training.
        vae: whose codes the prior was trained on.
        prior: draws codes for a caption.
        ranker: orders the candidates; without one they stay in the order of sampling.
        sampling: how a code is drawn where a call does not say it.
        num_candidates: how many samples a caption where a call does not say it; None leaves it to
            `generate` (512) and `dalle sample` (64).

    Raises:
        UsageError: the parts do not fit each other, or a number is out of range.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vae: DiscreteVAE,
        prior: Prior,
        ranker: ImageTextRanker | None = None,
        *,
        sampling: SamplingConfig = PAPER,
        num_candidates: int | None = None,
    ) -> None:
        check_numbers("pipeline", sampling)
        if num_candidates is not None:
            num_candidates = _candidates(num_candidates)
        self.sampling, self.num_candidates = sampling, num_candidates
        if prior.config.image_vocab != vae.num_tokens:
            raise UsageError(
                f"pipeline: the prior's image_vocab must be the vae's {vae.num_tokens}, "
                f"got {prior.config.image_vocab}"
            )
        if tokenizer.vocab_size > prior.config.text_vocab:
            raise UsageError(
                f"pipeline: the tokenizer must have at most the prior's {prior.config.text_vocab} "
                f"ids, got {tokenizer.vocab_size}"
            )
        for name, actual in _part_fingerprints(tokenizer, vae).items():
            expected = prior.trained_on.get(name, actual)
            if actual != expected:
                raise UsageError(
                    f"pipeline: {name} must be the one that the prior was trained with "
                    f"({expected}), got {actual}"
                )
        self.tokenizer, self.vae, self.prior, self.ranker = tokenizer, vae, prior, ranker
        rows, columns = prior.config.grid
        self.grid = (rows, columns)
        self.image_size = self.grid[0] * vae.factor
        if isinstance(ranker, ContrastiveRanker) and ranker.config.image_size != self.image_size:
            raise UsageError(
                f"pipeline: the ranker's image_size must be {self.image_size}, which the prior and "
                f"the vae draw, got {ranker.config.image_size}"
            )

    @property
    def device(self) -> torch.device:
        """Where the prior's parameters are."""
        return next(self.prior.parameters()).device

    @classmethod
    def from_pretrained(cls, directory: Path | str) -> Pipeline:
        """The pipeline that `save_pretrained` wrote.

        Raises:
            CheckpointError: the folder is damaged or holds something else.
        """
        directory = Path(directory)
        inside = directory / "pipeline"
        if (inside / "config.json").exists() and not (directory / "config.json").exists():
            raise CheckpointError(f"{directory}: must be a pipeline, got a run: take {inside}")
        head = read_head(directory, "Pipeline")
        ranker = load_ranker(directory / "ranker") if head.get("ranker") else None
        sampling = from_dict(  # older pipelines have none: the paper's
            SamplingConfig,
            head.get("sampling", {}),
            where=f"{directory}: sampling",
            error=CheckpointError,
        )
        try:
            return cls(
                Tokenizer.from_pretrained(directory / "tokenizer"),
                DiscreteVAE.from_pretrained(directory / "vae").eval(),
                Prior.from_pretrained(directory / "prior").eval(),
                ranker,
                sampling=sampling,
                num_candidates=head.get("num_candidates"),
            )
        except UsageError as error:
            raise CheckpointError(f"{directory}: {error}") from error

    def save_pretrained(self, directory: Path | str) -> None:
        """Writes the parts into subfolders tokenizer, vae, prior, ranker, and config.json last.

        A ranker of another class is not saved; set it again after loading. An older config.json is
        removed first, so that no mixture of two pipelines can be loaded.
        """
        directory = Path(directory)
        (directory / "config.json").unlink(missing_ok=True)
        self.tokenizer.save_pretrained(directory / "tokenizer")
        self.vae.save_pretrained(directory / "vae")
        self.prior.save_pretrained(directory / "prior")
        has_ranker = isinstance(self.ranker, ContrastiveRanker)
        if isinstance(self.ranker, ContrastiveRanker):
            self.ranker.save_pretrained(directory / "ranker")
        write_config(
            directory,
            ranker=has_ranker,
            sampling=self.sampling,
            num_candidates=self.num_candidates,
        )

    def prime_tokens(self, image: torch.Tensor, rows: int) -> torch.Tensor:
        """Codes of the top `rows` rows of a picture, in raster order: (rows * w,) int64.

        Args:
            image: (3, H, W) in [0, 1], of the pipeline's size.
            rows: 1 to h - 1 rows of codes (the paper's image-to-image gives 15 of 32).

        Raises:
            UsageError: shape or rows do not fit.
        """
        image = picture("pipeline", "prime_image", image, self.image_size)
        if not 0 < rows < self.grid[0]:
            raise UsageError(f"pipeline: prime_rows must be 1 to {self.grid[0] - 1}, got {rows}")
        with torch.no_grad():
            given = image[None].to(next(self.vae.parameters()).device)
            with without_autocast(given):
                tokens = self.vae.encode(given)
        return tokens[0, :rows].flatten()

    def sample(
        self,
        captions: Sequence[str],
        num_candidates: int | None = None,
        sampling: SamplingConfig | None = None,
        *,
        prime: torch.Tensor | None = None,
        **options: Unpack[SampleOptions],
    ) -> torch.Tensor:
        """Codes for many captions: (B, N, h, w) int64.

        A candidate's noise is a function of seed, caption and its own number alone: it is the
        same picture drawn alone, beside other captions, or as one of more candidates. A caption
        given twice gets the same pictures twice, unless its `first_candidate` differs.

        Args:
            captions: B captions.
            num_candidates: N; None: the pipeline's, else 512.
            sampling: how a token is drawn; None: the pipeline's.
            prime: (n,) codes every sample begins with.
            options: seed, first_candidate, max_batch, weights and callbacks, of `stream`.
        """
        if isinstance(captions, str):
            raise UsageError(f"pipeline: captions must be a list of strings, got {captions!r}")
        check_options("pipeline", options, SampleOptions.__annotations__)
        text = self._encoded(_captions(list(captions)))
        counts = {"num_candidates": num_candidates, "sampling": sampling}
        request = self.request("pipeline", len(text), {**options, **counts})
        out = torch.empty(
            len(text), request.num_samples, *self.grid, dtype=torch.int64, device="cpu"
        )
        for drawn in counted(self._steps(text, request, prime), len(text), request):
            if drawn.done:
                rows, columns = drawn.captions, drawn.samples
                part = drawn.tokens.unflatten(2, self.grid).cpu()
                out[rows.start : rows.stop, columns.start : columns.stop] = part
        return out

    def request(self, owner: str, captions: int, options: Mapping[str, object]) -> Request:
        """What the keywords of a call ask for, with the pipeline's own where they say nothing.

        Args:
            owner: begins the line of an error.
            captions: how many there are.
            options: of `stream` or `edit_stream`.

        Raises:
            UsageError: one of them is out of range, or there is no such option.
        """
        check_options(owner, options, DrawOptions.__annotations__)
        given = dict[str, Any](options)
        num_candidates, top = self.counts(given.pop("num_candidates", None), given.pop("top", None))
        first = first_numbers(owner, "first_candidate", given.pop("first_candidate", 0), captions)
        most = MAX_SEED + 1 - num_candidates  # numbers fit 64 bits with a sign
        if max(first, default=0) > most:
            raise UsageError(f"{owner}: first_candidate must be at most {most}, got {max(first)}")
        sampling = given.pop("sampling", None)
        changes = {f.name: given.pop(f.name, None) for f in fields(SamplingChanges)}
        sampling = SamplingChanges(**changes).applied(
            self.sampling if sampling is None else sampling
        )
        if given.get("max_batch") is None:  # of none at all, the line that says so is the decoder's
            fits = fitting(self.prior, SEQUENCES, sampling.guided, sampling.cache_bits)
            given["max_batch"] = max(1, fits)
        return Request(
            num_samples=num_candidates, top=top, first_sample=first, sampling=sampling, **given
        )

    def _encoded(self, captions: list[str]) -> torch.Tensor:
        """Captions, spelt as in the training, as tokens (B, text_len - 1) on the prior's device."""
        shaped = [self.tokenizer.shape(caption) for caption in captions]
        return self.tokenizer.encode(shaped, self.prior.config.text_len - 1).to(self.device)

    def _steps(
        self, text: torch.Tensor, request: Request, prime: torch.Tensor | None
    ) -> Generator[Drawn]:
        """`draw_parts` with the same prime for every caption."""
        given = None if prime is None else prime.to(self.device).expand(len(text), -1)
        return draw_parts(self.prior, text, request, given)

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """(…, h, w) codes -> (…, 3, H, W) float32 in [0, 1] on the CPU.

        A picture's bits do not depend on the others: torch convolves one alone in another way
        than several, so no picture is decoded alone.
        """
        device = next(self.vae.parameters()).device
        flat = tokens.flatten(0, -3).to(device)
        parts = []
        for part in flat.split(SEQUENCES):
            several = part.expand(2, -1, -1) if len(part) == 1 else part
            with without_autocast(several):
                parts.append(self.vae.decode(several)[: len(part)].float().cpu())
        images: torch.Tensor = torch.cat(parts).unflatten(0, tokens.shape[:-2])
        return images.clamp(0, 1)

    @overload
    def generate(self, caption: str, **options: Unpack[GenerateOptions]) -> Generation: ...

    @overload
    def generate(
        self, caption: list[str] | tuple[str, ...], **options: Unpack[GenerateOptions]
    ) -> list[Generation]: ...

    def generate(
        self, caption: str | list[str] | tuple[str, ...], **options: Unpack[GenerateOptions]
    ) -> Generation | list[Generation]:
        """Draws candidates for a caption and keeps the best by the ranker: the end of `stream`.

        Args:
            caption: what to draw; see `stream`. For a list of captions the result is a list, and
                each caption gets the pictures that it gets alone.
            options: of `stream`.

        Raises:
            UsageError: an argument is out of range, no option, or a caption is no string.
        """
        ends = (e for e in self.stream(caption, **options) if isinstance(e, Finished))
        results = [end.generation for end in sorted(ends, key=lambda end: end.caption)]
        return results[0] if isinstance(caption, str) else results

    def stream(
        self, caption: str | list[str] | tuple[str, ...], **options: Unpack[GenerateOptions]
    ) -> Generator[Event]:
        """Draws candidates for captions, and hands over what happens as it happens.

        `RowsFinished` comes with every row of codes, `CandidateFinished` with every picture, and
        one `Finished` for each caption with its best pictures. Candidates are drawn, decoded and
        scored in parts and only the best are kept, so memory does not grow with their number.
        Closing the iterator ends the work. Arguments are checked before it is returned.

        Args:
            caption: what to draw, or a list; cleaned as captions of training are, and without
                punctuation that none of them has.
            options: these keywords.
            num_candidates: how many to choose from for each caption; None: the pipeline's, else the
                paper's 512.
            top: how many to keep; None: 8, or all candidates where they are fewer.
            seed: same seed, same pictures.
            temperature, top_k, top_p, cond_scale, cache_bits: of `SamplingConfig`; None: as
                `sampling` says. The paper's are 1, none, none, 1, none.
            sampling: how a code is drawn; None: the pipeline's.
            prime_image: (3, H, W) in [0, 1] whose top `prime_rows` rows of codes are given.
            prime_rows: 1 to h - 1 with `prime_image`, 0 for half of the rows; 0 without.
            first_candidate: number of the first candidate, or one for each caption: 256 candidates
                and 256 more from number 256 on are those of 512.
            max_batch: candidates drawn at a time; None: what fits the memory, up to `SEQUENCES`.
            weights: "fp32" or, on some CPUs, "bf16".
            cancel: asked after every code; once it is true the work ends, and each caption's
                `Finished` has the best of the candidates that were finished.
            progress: called with (sequences done, sequences in all) after each part.
            code_progress: called with (codes done, codes in all) after each code of a part.

        Raises:
            UsageError: an argument is out of range, no option, or a caption is no string.
        """
        check_options("pipeline", options, GenerateOptions.__annotations__)
        captions, image = _captions(caption), options.pop("prime_image", None)
        rows = integer("pipeline", "prime_rows", options.pop("prime_rows", 0), 0)
        if image is None and rows:
            raise UsageError(f"pipeline: prime_rows must be 0 without a prime_image, got {rows}")
        request = self.request("pipeline", len(captions), options)
        prime = None if image is None else self.prime_tokens(image, rows or self.grid[0] // 2)
        return choose(self, captions, self._steps(self._encoded(captions), request, prime), request)

    def score(self, caption: str, images: torch.Tensor) -> torch.Tensor:
        """The ranker's scores of pictures (n, 3, H, W): (n,) float32, NaN without a ranker."""
        if self.ranker is None:
            return torch.full((len(images),), torch.nan, dtype=torch.float32, device="cpu")
        shaped = self.tokenizer.shape(caption)
        return self.ranker.scores([shaped] * len(images), images).float().cpu()

    def counts(self, num_candidates: int | None, top: int | None) -> tuple[int, int]:
        """How many candidates to draw and to keep, checked."""
        num_candidates = self._resolved(num_candidates)
        top = min(TOP, num_candidates) if top is None else integer("pipeline", "top", top, 1)
        if top > num_candidates:
            raise UsageError(
                f"pipeline: top must be 1 to num_candidates = {num_candidates}, got {top}"
            )
        return num_candidates, top

    def unfinished(self, begun: RowsFinished, top: int) -> Generation:
        """The first `top` candidates as far as they are drawn, the rest of each picture grey.

        Their tokens behind the finished rows are 0, their scores NaN.
        """
        tokens = begun.tokens[:top]
        count = len(tokens)
        whole = torch.zeros(count, *self.grid, dtype=torch.int64, device="cpu")
        whole[:, : begun.rows] = tokens
        side = self.image_size
        images = torch.full((count, 3, side, side), 0.5, dtype=torch.float32, device="cpu")
        images[:, :, : begun.rows * self.vae.factor] = self.decode(tokens)
        scores = torch.full((count,), torch.nan, dtype=torch.float32, device="cpu")
        numbers = torch.tensor(begun.candidates[:top], dtype=torch.int64, device="cpu")
        return Generation(images, scores, whole, numbers)

    def _resolved(self, num_candidates: int | None) -> int:
        """The argument if there is one, else the pipeline's number of candidates, else 512."""
        if num_candidates is not None:
            return _candidates(num_candidates)
        return self.num_candidates or CANDIDATES


def _candidates(number: int) -> int:
    return integer("pipeline", "num_candidates", number, 1, MAX_CANDIDATES)


def _captions(caption: str | list[str] | tuple[str, ...]) -> list[str]:
    """One caption or many as a list."""
    if isinstance(caption, str):
        return [caption]
    if not isinstance(caption, list | tuple):
        got = type(caption).__name__
        raise UsageError(f"pipeline: caption must be a string or a list of strings, got {got}")
    for one in caption:
        if not isinstance(one, str):
            raise UsageError(f"pipeline: caption must hold strings, got {one!r}")
    return list(caption)


def _part_fingerprints(tokenizer: Tokenizer, vae: DiscreteVAE) -> dict[str, str]:
    """Fingerprints to compare with a prior's `trained_on`, as far as they can be known."""
    hashes = {"tokenizer": tokenizer.fingerprint()}
    if all(p.dtype == torch.float32 for p in vae.parameters()):  # a rounded copy has other bits
        hashes["vae"] = fingerprint(vae)
    return hashes


def write_config(
    directory: Path,
    *,
    ranker: bool,
    sampling: SamplingConfig = PAPER,
    num_candidates: int | None = None,
) -> None:
    """The file that makes a folder with tokenizer, vae, prior (and ranker) a pipeline.

    Args:
        directory: the folder.
        ranker: whether it holds one.
        sampling: how `Pipeline.sample`, `generate` and `dalle sample` draw a code by default.
        num_candidates: how many samples a caption they draw by default; None leaves it to them.
    """
    head: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "class": "Pipeline",
        "dalle_version": __version__,
        "ranker": ranker,
        "sampling": asdict(sampling),
        "num_candidates": num_candidates,
    }
    write_atomic(directory / "config.json", to_json(head))
