"""Examples and explanations that the command line shows."""

from ..data import datasets

EXAMPLES = {
    "sample": """examples:
  adadiff sample digits --out samples --n 40 --class-labels 0,1,2,3,4,5,6,7,8,9 \\
      --policy exit:0.135,min_layer=3
  adadiff sample digits --out samples --steps 20,50 --solver dpm++2m --guidance-scale 2.5
  adadiff sample digits_plain --out duo --shallow-model runs/shallow/model.safetensors --t-switch 600
  adadiff sample dit_xl.safetensors --out dogs --class-labels 207 --guidance-scale 4 --guidance-interval 100,800 \\
      --decoder vae
  adadiff sample mscoco.safetensors --out cats --prompt "a cat" "two cats" --guidance-scale 2 --decoder vae
  torchrun --nproc_per_node 2 -m adadiff sample digits --out many -n 50000
after Ctrl-C, or a kill, the same command draws what is missing; `adadiff.output.shards.read` reads shards. Shards are
the same bits on any number of processes, if each has as many threads: torchrun sets OMP_NUM_THREADS=1 unless you do""",
    "train": """examples:
  adadiff train --out runs/digits
  adadiff train --out runs/plain --plain
  adadiff train digits_frozen --exit-options head=mlp
  adadiff train runs/digits/config.json --out runs/longer --steps 20000
  accelerate launch --num_processes 2 -m adadiff train canvases --precision bfloat16
  torchrun --nproc_per_node 2 -m adadiff train canvases
accelerate starts a process for every GPU, torchrun as many as are asked for on a CPU, too;
after Ctrl-C, or a kill, the same command goes on where it stopped, or at the last checkpoint""",
    "calibrate": """examples:
  adadiff calibrate digits --budget 0.55 --out digits-calibrated.safetensors
  adadiff calibrate digits --budget 0.4,0.55,0.7,0.85 --aim distribution --out d.safetensors --picture d.png
the file is a model like any other: sample it with --policy exit:budget=0.55, or, by timestep alone,
--policy exit:table=0.55""",
    "evaluate": """examples:
  adadiff evaluate digits
  adadiff evaluate runs/digits/model.safetensors --n 5000 --steps 20 --policy exit:depth=8 --policy exit:depth=6 \\
      --json quality.json
  adadiff evaluate samples --features digits
  adadiff evaluate samples --reference fid_stats_cifar10_train_pytorch.npz --features inception:pt_inception.pth
a model's policies are compared with the full network from the same noises, with or without a reference""",
    "convert": """examples:
  adadiff convert imagenet256_uvit_huge.pth uvit_huge.safetensors --preset imagenet256_uvit_huge
  adadiff convert 75000.ckpt adadiff_cifar10.safetensors --preset cifar10_uvit_small
  adadiff convert DiT-XL-2-256x256.pt dit_xl.safetensors
  adadiff convert DiT-XL-2-256 dit_xl.safetensors --served-by dit
no weights are run and nothing but tensors is read from a pickle""",
    "diff": """examples:
  adadiff diff digits --seed 3 --class-label 7 --other policy=exit:0.135,min_layer=3 --picture diff.png
  adadiff diff digits --policy exit:0.1 --other dtype=bfloat16
  adadiff diff canvases --other model=canvases_plain
for each step: exit layers, uncertainties there, and how far the two images are apart""",
    "info": """examples:
  adadiff info""",
    "inspect": """examples:
  adadiff inspect digits
  adadiff inspect runs/digits/model.safetensors --json
  adadiff inspect DiT-XL-2-256x256.pt""",
}

SOLVER_HELP = (
    "ddim, ddim:ETA, ddpm, dpm++2m, dpm-fast, dpm++fast or euler-maruyama; where a solver can choose its timesteps, "
    "as in ddpm:spacing=respaced (default: ddim)"
)
GUIDANCE_HELP = "of classifier-free guidance, as in diffusers (default: 1, none)"
TRAIN_HELP = {
    "preset": "the network",
    "data": "what it is trained on: digits; canvases, also as in canvases:side=3,hard=0.75,n=50000; or files of yours, "
    f"as in cifar10:FOLDER: {', '.join(datasets.NAMES)}",
    "network": "settings of the preset's network to change, as in depth=2 dim=96",
    "exits": "train the network together with its exits, or alone",
    "exit_options": "settings of the exits to change, as in head=mlp shared_head=false",
    "recipe": "joint: everything; frozen: only the exits, on the network of INIT",
    "start": "how a fresh network begins: as its authors', or linear (U-ViT), for networks narrower than theirs",
    "init": "checkpoint to start from: a name that ships with the package, or a file",
    "loss": "of the exits: paper or official, to the noise; relative, to the full network; supervised, of both",
    "steps": "optimizer updates",
    "batch": "images per update, of all processes together",
    "accumulate": "parts in which each process takes its share of a batch, to save memory",
    "lr": "learning rate after the warm-up; from there a cosine to zero",
    "warmup": "updates until the learning rate is reached",
    "weight_decay": "AdamW's",
    "ema": "decay of the averaged weights, which are the result",
    "uem_weight": "lambda, the weight of the uncertainty loss",
    "ual_weight": "beta, the weight of the uncertainty-aware layer loss",
    "label_drop": "share of labels replaced by the null class",
    "precision": "of the network's products: float32, or bfloat16 by autocast",
    "seed": "of the weights, batches and noises",
    "save_every": "updates between checkpoints",
    "log_every": "updates between rows of log.jsonl",
    "sample_every": "updates between grids of pictures; 0 for none",
    "tensorboard": "log for TensorBoard, too",
}
