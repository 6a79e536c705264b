"""Draw with a budget and save a grid.

    python examples/budget.py

`exit:budget=0.55` aims at 55 % of the network's multiply-adds on average. Each sample decides for itself where it
exits. The thresholds were calibrated beforehand and ship with the model; `adadiff inspect canvases` lists them.

Takes 5 s of CPU time, writes budget.png and prints:

    40 samples in ... s (.../s); 6.66 of 13 blocks a step (51.2%), 54.5% of the multiply-adds...
    wrote budget.png
"""

from pathlib import Path

import adadiff
from adadiff.output.pictures import make_grid, to_pixels, write_png


def main() -> None:
    model = adadiff.load("canvases")
    labels = [i % 20 for i in range(40)]  # 0 to 9: one digit; 10 to 19: four digits that count
    images, report = adadiff.sample(model, 40, steps=20, policy="exit:budget=0.55", class_labels=labels)
    print(report)
    write_png(Path("budget.png"), make_grid([to_pixels(image) for image in images], columns=10))
    print("wrote budget.png")


if __name__ == "__main__":
    main()
