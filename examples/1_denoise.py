"""§2.1: a blind denoiser, the score it is, and how sparse its channel averages are (Fig. 1, 2)."""

from common import arguments, model, patches, save
from matplotlib.figure import Figure

import fastphi
from fastphi import noise
from fastphi.analysis.common import untrained
from fastphi.analysis.sparsity import sparsity
from fastphi.analysis.stability import stability
from fastphi.support import plots

options = arguments(__doc__)
denoiser, x = model(), patches(20 if options.reduced else 200)

# One network for every noise level: it is not told σ.
rows, labels = [x[:8]], ["clean"]
for k, sigma in enumerate((0.1, 0.3, 0.6)):
    noisy = x[:8] + sigma * noise.normal(0, range(8), noise.stream("evaluate", k), 0, (3, 64, 64))
    rows += [noisy, denoiser(noisy).detach()]
    labels += [f"σ = {sigma}", "denoised"]
score = denoiser.score(noisy, sigma=0.6)  # (denoised − noisy)/σ²: the gradient of log p_σ
print("score:", tuple(score.shape))

# ā of every block, at a few noise levels, beside a network that was not trained.
levels, draws = (0.0, 0.1, 0.2, 0.5, 1.0), 4 if options.reduced else 20
store = fastphi.extract(denoiser, x, sigmas=levels, draws=draws, blocks="all")
control = fastphi.extract(untrained(denoiser), x, sigmas=levels, draws=draws, blocks="all")
sparse = sparsity(store, denoiser, sigma=0.2, controls={"untrained": control})
stable = stability(store, controls={"untrained": control})
print("PR goes the paper's way in:", [block for block, so in sparse.steps.items() if so])
print("middle block the most stable:", stable.shown)

figure = Figure(figsize=(9, 10), layout="constrained")
top, bottom = figure.subfigures(2, 1)
plots.images(top.subplots(), rows, labels)
left, right = bottom.subplots(1, 2)
sparse.plot(left)
stable.plot(right)
save(figure, options.out, "1_denoise.png")
