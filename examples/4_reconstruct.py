"""§2.3: images from φ (Algorithms 1 and 2), how alike they are, and what matching does (Fig. 7, 20)."""

from common import arguments, model, patches, save
from matplotlib.figure import Figure

import fastphi
from fastphi import targets
from fastphi.analysis.likeness import likeness
from fastphi.analysis.neighbours import distinct
from fastphi.analysis.noise_level import noise_level
from fastphi.support import plots

options = arguments(__doc__)
denoiser, x = model(), patches(40 if options.reduced else 300)
phi = fastphi.extract(denoiser, x, sigmas=[0.2], draws=2).array(0.2)
clean = x[distinct(phi, 2)]

steps, iterations = (2, 3) if options.reduced else (30, 60)
result = fastphi.reconstruct(
    denoiser,
    targets.from_images(denoiser, clean, draws=4, copies=8),
    sigmas=(1.0, 0.03, steps),
    max_iter=iterations,
    progress=True,
)
samples = result.images.reshape(2, 8, 3, 64, 64)
alike = likeness(denoiser, clean, samples)
print(
    f"layout: {alike.layout.mean():.2f} with the own target, {alike.layout_other.mean():.2f} with"
)
print(f"the other; samples of one target differ by {alike.between.mean():.3f} (rms)")
level = noise_level(denoiser, x[:4], (0.1, 0.4), max_iter=iterations)
print(f"matching changes the noise level by {100 * level.change.max():.1f} % at most")

figure = Figure(figsize=(10, 4), layout="constrained")
left, middle, right = figure.subplots(1, 3)
for ax, target, eight in zip((left, middle), clean, samples, strict=True):
    plots.reconstruction_panel(ax, target, eight)
level.plot(right)
save(figure, options.out, "4_reconstruct.png")
