"""Help texts of options that several commands share, and of the settings of a training."""

from ..data.sources import SOURCES
from ..diffusion.prediction import PREDICTION_TYPES
from ..diffusion.schedules import NAMES as SCHEDULES
from ..diffusion.solvers import SOLVERS
from ..metrics.extractors import FEATURES

POLICY_TABLE = """\
A policy decides which computation a sample skips: after which block it exits, that is, leaves the network, or when it \
reuses results of one of its earlier steps. After each block, the model estimates the error of exiting there: the \
uncertainty, from 0 to 1.
  full                every block runs
  exit:U              after the first block with an
                      uncertainty below U, 0 < U < 1
  exit:U,min_layer=K  like exit:U, but not before block K
  exit:patience=U     like exit:U, but ignores the first
                      such block in the first half of the
                      network
  exit:depth=K        after block K; 7.5: after 7 at half
                      of the timesteps, after 8 at others
  exit:batch-mean=U   all samples at once, by their mean
                      uncertainty, as AdaDiff's sampler
                      (a baseline)
  exit:budget=SHARE   by the thresholds that `adadiff
                      calibrate` chose for SHARE of the
                      full network's work
  exit:table=SHARE    the same share, by timestep alone
  cache:threshold=C   after the first block, reuses the
                      other blocks of the sample's last
                      full step while the relative change
                      of that block's residual since then
                      is at most C, such as 0.1
  cache:threshold=C,first=K,gate=input
                      decides after K blocks, by changes
                      of the first block's input, summed
                      over steps
  cache:threshold=C,order=1
                      extrapolates what it reuses from
                      the sample's last two full steps;
                      reuse: takes order=1, too
  cache:batch=C       all samples at once (a baseline)
  reuse:every=K       every K-th step is full, the others
                      reuse its blocks; dense_early=N and
                      dense_late=N: full steps at the
                      start and at the end
  estimate:FILE       reuses where the error of that is
                      estimated to be small; FILE is from
                      `adadiff calibrate-reuse`; with
                      share=SHARE of the work, and
                      by=sample or, for all samples in
                      the same steps, by=step, after
                      commas (default: the better one)
  width:W             a share W of heads and channels (of
                      a slimmable model)
  width:FILE          a share for each timestep, as
                      `adadiff search` found it
  cascade:FILE        a student of few steps draws; the
                      model improves the images that an
                      oracle finds worst (`adadiff
                      distill`); with share=SHARE,
                      mode=refine or mode=regenerate, and
                      sigma=NOISE, after commas
Different kinds are joined by +, as in
cache:threshold=0.1+exit:0.135"""
SOLVER_HELP = (
    f"sampling method: {SOLVERS.forms(short=True)}; ddim:ETA from 0, deterministic, to 1; unipc with order=1 to 3 and "
    "variant=bh1 or bh2, as in unipc:order=3; each step of heun counts as two of --steps; euler-maruyama is for models "
    "of schedule vp; models of schedule flow take flow-euler, flow-sde, ddim, heun, unipc and dpm++2m, all but ddim "
    "with shift=NUMBER; ddim, ddpm, dpm++2m, unipc and heun accept a spacing of the timesteps (leading, trailing, "
    "linspace or respaced; ddim also trailing-diffusers, which steps between the same timesteps as diffusers), as in "
    "ddpm:spacing=respaced (default: ddim)"
)
AUTO_HELP = "auto: as many as the model's step selector, which `adadiff train-steps` makes, chooses for each sample"
GUIDANCE_HELP = "scale of classifier-free guidance, defined as in diffusers; 1 is no guidance (default: 1)"
FEATURES_HELP = (
    f"{FEATURES.forms(short=True)}, which maps float32 images [N, C, H, W] in [-1, 1] to features [N, F]; "
    "inception:FILE is the Inception network of FID, with the weight file of pytorch-fid"
)

TRAIN_GROUPS = {  # fields of TrainConfig by the heading under which they are explained
    "what to train": {
        "preset": "network, with its noise schedule: digits, digits_prototypes, canvases, letters, or another preset "
        "listed by `adadiff convert --help`",
        "network": "changes to the preset's network, as in depth=2 dim=96; `adadiff inspect MODEL --all` lists the "
        "settings as network.KEY",
        "schedule": f"noise schedule instead of the preset's: {', '.join(SCHEDULES)}",
        "prediction_type": f"prediction type instead of the preset's: {', '.join(PREDICTION_TYPES)} (schedule flow: "
        "all but epsilon)",
        "exits": "train exits, that is, for each block an uncertainty estimation module and an output head; --no-exits "
        "trains the plain network",
        "exit_options": "changes to the exits, as in head=mlp time=false; `adadiff inspect MODEL --all` lists the "
        "settings as exits.KEY",
        "widths": "widths at which the network is to work, as shares of heads and MLP channels, ascending up to 1, as "
        "in 0.25,0.5,1: each update trains the full width, the smallest and a random one of the others",
        "recipe": "joint trains the network together with its exits; frozen trains only the exits and leaves the "
        "network of --init as it is",
        "init": "model to start from, the name of one in the package or a file; without it, the weights start at "
        "random",
        "start": "random weights to start with: published, as the authors of the network choose them; linear (U-ViT "
        "only), for networks much narrower than theirs",
    },
    "data": {
        "data": f"training images: {SOURCES.forms(short=True)}; settings, as in canvases:side=3,n=50000; letters:FILE "
        "is what `adadiff data letters` wrote, FOLDER a data set in a local folder",
        "label_drop": "share of the labels, in [0, 1), that are replaced by the null class for classifier-free "
        "guidance; 0 for networks without one",
    },
    "loss": {
        "loss": "loss of the exits: paper or official (of the AdaDiff paper or of its code; errors are relative to the "
        "true noise), relative (errors are relative to the full network, which --init must provide), or supervised "
        "(predictions learn the true noise, uncertainties the error relative to the full network)",
        "uem_weight": "weight of the loss of the uncertainty estimation modules (lambda in the AdaDiff paper)",
        "ual_weight": "weight of the loss of the predictions at the exits (beta in the AdaDiff paper)",
    },
    "optimization": {
        "steps": "number of optimizer updates",
        "batch": "images in an update, counted over all processes",
        "accumulate": "number of parts into which each process splits its images of an update, to save memory",
        "lr": "peak learning rate of AdamW, reached after the warm-up; from there it falls to 0 along a cosine",
        "warmup": "updates in which the learning rate rises to its peak",
        "weight_decay": "weight decay of AdamW",
        "ema": "decay, in [0, 1), of the moving average of the weights; the average is the trained model",
        "precision": "precision in which the network computes; bfloat16 uses autocast and keeps the weights in float32",
        "seed": "seed of the initial weights, the batches and the noise",
    },
    "output": {
        "save_every": "updates between checkpoints",
        "log_every": "updates between rows of log.jsonl",
        "sample_every": "updates between grids of samples, saved in the folder samples; 0 saves none",
        "tensorboard": "also write a log for TensorBoard to the folder tensorboard",
    },
}
