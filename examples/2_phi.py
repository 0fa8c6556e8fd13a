"""§2.2: φ, its selective channels, and neighbours in φ against neighbours in pixels (Fig. 3, 5, 14)."""

from common import arguments, model, patches, save
from matplotlib.figure import Figure

import fastphi
from fastphi.analysis.neighbours import distinct, nearest
from fastphi.analysis.selectivity import exciting, selectivity
from fastphi.analysis.subspaces import subspaces
from fastphi.support import plots

options = arguments(__doc__)
x = patches(60 if options.reduced else 600)
store = fastphi.extract(model(), x, sigmas=[0.2], draws=2 if options.reduced else 8)
phi = store.array(0.2)  # (N, C): the mean of ā of the middle block over noise

selective = selectivity(phi, draws=50 if options.reduced else 300)
print(f"dip {selective.dip:.3f}, p = {selective.p:.2g}; shown: {selective.shown}")
local = subspaces(phi, k=min(50, len(phi) // 4), queries=100)
print(f"local dimension {local.dimension.mean():.2f} d (paper: 0.2-0.3)")

figure = Figure(figsize=(11, 9), layout="constrained")
(a, b), (c, d) = figure.subplots(2, 2)
selective.plot(a)
channels = selective.specialised()[:6]
plots.images(b, [x[exciting(phi, int(i), 8)] for i in channels], [str(i) for i in channels])
b.set_title("what excites specialised channels")
queries = distinct(phi, 5)
for ax, rows, title in ((c, phi, "nearest in φ"), (d, x.flatten(1).numpy(), "nearest in pixels")):
    index, _ = nearest(rows[queries], rows, k=6)
    plots.images(ax, [x[row] for row in index])
    ax.set_title(title)
save(figure, options.out, "2_phi.png")
