"""The paper's own numbers of Figures 7 and 9, to stand in grey beside ours.

The values of Figure 9 are read off its plots: FID within about 0.3, Inception Score within 0.1.
"Solid" is against all validation pictures, "dashed" without those that overlap with the training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

RADII = (0, 1, 2, 4, 8)  # of Figure 9 a, b
CANDIDATES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # of Figure 9 c

Curves = Mapping[str, Sequence[float]]

FIGURE_9A_FID: Curves = {  # MS-COCO, solid
    "DALL-E": (28.4, 28.8, 46.7, 85.2, 87.1),
    "DF-GAN": (27, 34.7, 56.7, 92.7, 99),
    "DM-GAN": (27.5, 39.6, 74, 121, 114),
    "AttnGAN": (35, 44.1, 72.6, 110, 105.5),
}
FIGURE_9A_FID_DASHED: Curves = {
    "DALL-E": (27.5, 27.8, 45.6, 83.4, 85.4),
    "DF-GAN": (26.5, 33.7, 55.5, 90.7, 97),
    "DM-GAN": (27, 39, 73, 119, 112),
    "AttnGAN": (35, 44, 72, 108, 104),
}
FIGURE_9A_IS: Curves = {
    "DALL-E": (17.9, 19.3, 17.8, 11.1, 6.0),
    "DF-GAN": (18.7, 16.1, 12.9, 9.2, 5.5),
    "DM-GAN": (32.2, 27.2, 17.4, 9.3, 5.1),
    "AttnGAN": (23.3, 19.7, 14.2, 8.3, 4.9),
}
FIGURE_9B_FID: Curves = {  # CUB, solid
    "DALL-E": (56.2, 50.7, 56.8, 74.2, 70.4),
    "DM-GAN": (18.8, 24, 42.2, 62.6, 67.2),
    "DF-GAN": (23.5, 28.6, 46.2, 65.1, 68.9),
    "AttnGAN": (24.8, 38, 62, 79.8, 74.1),
}
FIGURE_9B_FID_DASHED: Curves = {"DALL-E": (58.3, 52.6, 58.5, 75.7, 69.9)}
FIGURE_9B_IS: Curves = {
    "DALL-E": (2.64, 2.82, 2.89, 2.51, 1.40),
    "DM-GAN": (4.71, 4.70, 4.47, 3.48, 1.56),
}
FIGURE_9C_FID: Sequence[float] = (34.6, 31.3, 29.4, 28.4, 27.9, 27.7, 27.6, 27.4, 27.5, 27.7)
FIGURE_9C_IS: Sequence[float] = (15.4, 16.3, 17.2, 17.6, 17.8, 18.0, 18.0, 18.1, 18.0, 17.9)
# Figure 7: the majority of five workers, in per cent, DALL-E against DF-GAN, and how the votes of
# DALL-E were split (5, 4 or 3 of 5).
FIGURE_7_MAJORITY: Mapping[str, tuple[float, float]] = {
    "more realistic": (90.0, 10.0),
    "better match": (93.3, 6.6),
}
FIGURE_7_SPLIT: Mapping[str, tuple[float, float, float]] = {
    "more realistic": (43, 32, 15),
    "better match": (52, 30, 12),
}
