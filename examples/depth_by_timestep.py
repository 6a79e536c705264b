"""Draw a picture of exit depth by timestep, for easy and for hard images.

    python examples/depth_by_timestep.py

Labels 0 to 9 of canvases are one digit, 10 to 19 are four that count. Lines are means over samples, bands the middle
eight of ten. Takes matplotlib.

Takes 6 s of CPU time, writes depth_by_timestep.png and prints:

    one digit    5.53 blocks in the first half of the steps,  7.56 in the second
    four digits  6.73 blocks in the first half of the steps,  9.76 in the second
    wrote depth_by_timestep.png
"""

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib.figure import Figure

import adadiff


def main() -> None:
    model, n = adadiff.load("canvases"), 100
    labels = [i % 20 for i in range(n)]
    _, report = adadiff.sample(model, n, steps=20, policy="exit:budget=0.6", class_labels=labels)
    layers = report.exit_layer[:, :, 0].double()  # [steps, n]
    t = adadiff.trace(model, steps=20).t  # [steps], the network's time, 1000 is noise
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axis = figure.subplots()
    hard = torch.tensor(labels) >= 10
    for name, own, colour in (("one digit", ~hard, "tab:blue"), ("four digits", hard, "tab:orange")):
        depth = layers[:, own]
        low, high = depth.quantile(torch.tensor([0.1, 0.9], dtype=torch.float64), dim=1)
        axis.plot(t, depth.mean(1), "o-", color=colour, markersize=3, label=name)
        axis.fill_between(t, low, high, color=colour, alpha=0.2, linewidth=0)
        early, late = depth[:10].mean(), depth[10:].mean()
        print(f"{name:11} {early:5.2f} blocks in the first half of the steps, {late:5.2f} in the second")
    axis.set(xlabel="timestep (noise to image)", ylabel="blocks run", ylim=(0, model.num_layers + 0.5))
    axis.invert_xaxis()
    axis.legend()
    figure.savefig("depth_by_timestep.png", dpi=120)
    print("wrote depth_by_timestep.png")


if __name__ == "__main__":
    main()
