"""§2.2: clusters of φ, measured against a structureless Gaussian, and the map of φ (Fig. 6, 15)."""

import numpy as np
from common import arguments, model, patches, save
from matplotlib.figure import Figure

import fastphi
from fastphi.analysis.clusters import agreement, clusters
from fastphi.analysis.embedding import embedding
from fastphi.support import plots

options = arguments(__doc__)
x = patches(80 if options.reduced else 800)
store = fastphi.extract(model(), x, sigmas=[0.2, 0.5], draws=2 if options.reduced else 8)
phi, k, starts = store.array(0.2), 4 if options.reduced else 16, 2 if options.reduced else 10

found = clusters(phi, k, starts=starts)
print(f"nearest pairs {np.nanmedian(found.nearest):.2f} standard deviations apart, a Gaussian's")
print(f"{found.gaussian_nearest.mean():.2f}: without the second number the first proves nothing")
again = agreement(phi, k, others={"σ = 0.5": store.array(0.5)}, starts=starts, seeds=3)
print({name: round(float(v.mean()), 2) for name, v in again.found.items()})

figure = Figure(figsize=(11, 9), layout="constrained")
(a, b), (c, d) = figure.subplots(2, 2)
found.plot(a)
again.plot(b)
embedding(phi, labels=found.clusters.labels).plot(c)
plots.images(d, [x[found.clusters.members(i, 8)] for i in range(min(k, 6))])
d.set_title("random members, one cluster per row")
save(figure, options.out, "3_clusters.png")
