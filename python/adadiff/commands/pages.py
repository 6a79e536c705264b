"""Help texts of the command line: a page for each command."""

from dataclasses import dataclass

from ..config import PRESETS

SUMMARY = (
    "Draw images with diffusion transformers whose samples exit early: each one skips the remaining blocks of the "
    "network as soon as the estimated error of doing so is small."
)
START = """first steps:
  adadiff info
  adadiff sample digits --out samples --policy exit:0.135
  adadiff inspect digits
  adadiff evaluate digits --policy exit:0.135

`adadiff COMMAND --help` explains the options of a command and gives examples.

exit code: 0 on success; 2 if the input cannot be used, with the reason on stderr; 130 after Ctrl-C."""


@dataclass(frozen=True)
class Page:
    """summary: for the list of commands. usage: without "adadiff" and the command's name. description: what the command
    does and what it leaves on disk. examples: indented, at most 58 columns wide, so that they fit a narrow terminal.
    notes: for after the examples."""

    summary: str
    usage: str
    description: str
    examples: str
    notes: str = ""


PAGES = {
    "info": Page(
        summary="show versions, devices and kernels",
        usage="",
        description="Show the versions of the package and of its dependencies, the CPU and the GPUs that were found, "
        "and which implementation of each kernel runs on them. Nothing is written to disk.",
        examples="""  adadiff info""",
    ),
    "sample": Page(
        summary="draw images and save them",
        usage="MODEL --out FOLDER [options]",
        description="Draw samples from a model and save them in the folder --out, as one PNG file for each sample or "
        "as array files. The folder also gets report.json, which holds the settings and the cost of the run, and, for "
        "images, an overview in grid.png. For up to 10,000 PNG files, by_sample in report.json lists the steps that "
        "--steps auto chose for each sample and which samples a cascade passed on to the teacher.",
        examples="""\
  # 40 digits, four of each class, with early exit
  adadiff sample digits --out samples --n 40 \\
      --class-labels 0,1,2,3,4,5,6,7,8,9 \\
      --policy exit:0.135,min_layer=3

  # a calibrated model at 55 % of the full network's work
  adadiff sample canvases --out counts --steps 20 \\
      --class-labels 13 --policy exit:budget=0.55

  # as many steps as each class needs
  adadiff sample digits_prototypes --out classes --n 20 \\
      --class-labels 0,1,2,3,10,11,12,13 --steps auto

  # samples of 20 and of 50 steps, with guidance
  adadiff sample digits --out mixed --steps 20,50 \\
      --solver dpm++2m --class-labels 3 --guidance-scale 2.5

  # a student of 4 steps, the worst third refined
  adadiff sample digits --out refined --steps 20 \\
      --class-labels 0,1,2,3,4,5,6,7,8,9 \\
      --policy cascade:digits_cascade,share=0.33

  # a shallow model for the noisy timesteps (DuoDiff)
  adadiff sample canvases_plain --out duo \\
      --shallow-model canvases_shallow --t-switch 600

  # a converted DiT, its latents decoded to pictures
  adadiff sample dit_xl.safetensors --out dogs \\
      --class-labels 207 --guidance-scale 4 \\
      --guidance-interval 100,800 --decoder vae

  # a converted text-to-image model
  adadiff sample mscoco.safetensors --out cats \\
      --prompt "a cat" "two cats" --guidance-scale 2 \\
      --decoder vae

  # 50,000 samples in array files, by two processes
  torchrun --nproc_per_node 2 -m adadiff sample digits \\
      --out many -n 50000

  # the same by all machines of a Ray cluster
  adadiff sample digits --out many -n 50000 --ray""",
        notes="If the run is interrupted, the same command draws only the samples that are missing.\n\n"
        "In Python, `adadiff.output.shards.read(FOLDER)` reads the array files. They are the same, bit for bit, for "
        "any number of processes, provided that each process has the same number of threads; torchrun gives each one "
        "thread unless OMP_NUM_THREADS is set.",
    ),
    "serve": Page(
        summary="draw images for clients over HTTP",
        usage="MODEL [MODEL ...] [options]",
        description="Serve models over HTTP in the shape of OpenAI's images API, with previews while an image is "
        "drawn, metrics for Prometheus, and health checks. Requests share every forward pass, whenever they arrive. "
        "Nothing is written to disk; the log goes to stderr.",
        examples="""\
  adadiff serve digits

  # two models, a policy by name, and logs for programs
  adadiff serve canvases digits --log-format json \\
      --policy quick=exit:budget=0.55 --max-images 4

  # for other machines, with a key
  adadiff serve digits --host 0.0.0.0 --port 80 \\
      --api-key-file keys.txt

  # a converted text-to-image model
  adadiff serve mscoco.safetensors --decoder vae""",
        notes="SIGTERM or Ctrl-C finishes the requests in flight, then ends with exit code 0; a second one, or "
        "--drain-timeout, cancels them, and the exit code is 1.\n\n"
        "Clients may ask for policies of exit:, cache: and reuse:, except exit:batch-mean and cache:batch. All others "
        "can be given only by --policy.\n\n"
        "The file README.md in the folder adadiff/serving explains requests, replies, metrics and limits.",
    ),
    "inspect": Page(
        summary="show what a model is and what it costs",
        usage="MODEL [options]",
        description="Show the architecture of a model, its parameters and multiply-adds, its exits and calibration, "
        "and how it was trained. Nothing is written to disk unless --picture is given.",
        examples="""\
  adadiff inspect digits
  adadiff inspect canvases --picture thresholds.png
  adadiff inspect runs/digits/model.safetensors --json
  adadiff inspect DiT-XL-2-256x256.pt""",
    ),
    "evaluate": Page(
        summary="measure the quality of samples",
        usage="MODEL|IMAGES [options]",
        description="Draw samples from a model with one or several exit policies, or read existing images, and print "
        "their quality: Fréchet and kernel distance to real images, accuracy (of digits, canvases and letters), and "
        "the difference to the samples of the full network, with 95 % intervals. Nothing is written to disk unless "
        "--json is given.",
        examples="""\
  # the full network alone
  adadiff evaluate digits

  # two policies against the full network
  adadiff evaluate runs/digits/model.safetensors \\
      --n 5000 --steps 20 --policy exit:depth=8 \\
      --policy exit:depth=6 --json quality.json

  # images that `adadiff sample` has drawn
  adadiff evaluate samples --features digits

  # FID of a folder of images, with published statistics
  adadiff evaluate samples \\
      --reference fid_stats_cifar10_train_pytorch.npz \\
      --features inception:pt_inception.pth""",
        notes="All policies draw their samples from the same noise, so that each sample is compared with that of the "
        "full network. This needs no real images.",
    ),
    "diff": Page(
        summary="compare two ways to draw one sample, step by step",
        usage="MODEL --other KEY=VALUE ... [options]",
        description="Draw one sample in two ways, first with the options as given and then with the changes in "
        "--other, and print for each step the exit layers, the uncertainties there and the distance between the two "
        "images. Nothing is written to disk unless --picture is given.",
        examples="""\
  # early exit against the full network
  adadiff diff digits --seed 3 --class-label 7 \\
      --other policy=exit:0.135,min_layer=3 \\
      --picture diff.png

  # does bfloat16 change where a sample exits?
  adadiff diff digits --policy exit:0.1 \\
      --other dtype=bfloat16

  # two models
  adadiff diff canvases --other model=canvases_plain""",
    ),
    "calibrate": Page(
        summary="choose exit thresholds for a share of the work",
        usage="MODEL --budget SHARE --out FILE\n                         [options]",
        description="Choose exit thresholds for every timestep and block, so that sampling takes a given share of the "
        "full network's multiply-adds, and print what each share loses on samples that were not used for the choice. "
        "The model with its thresholds is written to the file --out.",
        examples="""\
  adadiff calibrate digits --budget 0.55 \\
      --out calibrated.safetensors

  # four budgets in one file, and a picture
  adadiff calibrate digits --budget 0.4,0.55,0.7,0.85 \\
      --aim distribution --out calibrated.safetensors \\
      --picture calibrated.png""",
        notes="The file is used like any other model. `adadiff sample FILE --policy exit:budget=0.55` decides by the "
        "uncertainty of each sample, --policy exit:table=0.55 by the timestep alone. After an interruption the same "
        "command goes on where it stopped: until FILE is written, FILE.runs keeps the runs so far.",
    ),
    "calibrate-reuse": Page(
        summary="learn which samples may reuse earlier steps, and where",
        usage="MODEL --out FILE [options]",
        description="Estimate how much the final image changes if a step reuses what an earlier one computed: by step, "
        "and by sample, from how the features of a sample grew between its full steps so far. Then measure, on other "
        "samples, what different shares of the work lose, if every sample decides for itself (by sample), and if all "
        "reuse in the same steps (by step). Write the estimates to the JSON file --out. The model needs no exits.",
        examples="""\
  adadiff calibrate-reuse letters --steps 20 \\
      --solver dpm++2m --out reuse.json

  # for guided samples
  adadiff calibrate-reuse letters --steps 20 \\
      --guidance-scale 2 --out guided.json""",
        notes="`adadiff sample MODEL --policy estimate:FILE,share=0.6` follows the estimates, with any share "
        "between the measured ones. They hold for this network, solver and number of steps; others are refused. After "
        "an interruption the same command goes on where it stopped: until FILE is written, FILE.runs keeps the runs so "
        "far.",
    ),
    "search": Page(
        summary="find a width for each timestep",
        usage="MODEL --weight W --out FILE\n                         [options]",
        description="Find which share of heads and channels a slimmable model needs at which timestep (DDSM): an "
        "evolutionary search over schedules, each of which draws samples. Write the best schedule to the JSON file "
        "--out, and print its quality and that of each constant width, on samples that the search did not draw.",
        examples="""\
  adadiff search digits_slim --weight 2 --out widths.json

  # images as the whole network draws them
  adadiff search digits_slim --aim faithful --weight 0.1 \\
      --n 64 --steps 20 --out widths.json""",
        notes="The model must be slimmable, that is, trained with widths, as by `adadiff train digits_slim`. The "
        "schedule is used by `adadiff sample MODEL --policy width:FILE`. The search needs pymoo: pip install "
        "'adadiff_kernels[search]'. If it is interrupted, FILE holds the best schedule so far, and the same command "
        "with --force goes on where it stopped: until the search is done, FILE.runs keeps what the schedules reached.",
    ),
    "train-steps": Page(
        summary="learn how many steps each class or prompt needs",
        usage="MODEL --out FILE [options]",
        description="Train a step selector: a small network that reads the class or the prompt of a sample and chooses "
        "its number of steps among --candidates, as few as keep the image within --bar of that of the largest "
        "candidate. Images of every candidate are drawn from the same noises; then the selector learns from their "
        "errors, by policy gradient. Print its choices and, on noises that it was not trained on, its error beside "
        "those of the same number of steps for all samples and of its own choices in random order. The model with its "
        "selector is written to the file --out.",
        examples="""\
  adadiff train-steps digits_prototypes \\
      --out selected.safetensors

  # fewer candidates, a stricter bar
  adadiff train-steps canvases --candidates 5,10,20 \\
      --bar 0.03 --out selected.safetensors

  # a text-to-image model: one prompt a line
  adadiff train-steps mscoco.safetensors \\
      --prompts captions.txt --guidance-scale 2 \\
      --candidates 10,20,30,50 --out selected.safetensors""",
        notes="The file is used like any other model: `adadiff sample FILE --steps auto`, with the solver and the "
        "guidance scale given here. If the run is interrupted while it draws, the errors so far are in "
        "FILE.errors.safetensors, and the same command goes on from there.",
    ),
    "train": Page(
        summary="train a model with exits, or add exits to one",
        usage="[CONFIG] [options]",
        description="Train a model, or exits for a finished model, as CONFIG says; options override its values. The "
        "folder --out gets model.safetensors (the trained model), state.safetensors (to resume from), config.json and "
        "log.jsonl.",
        examples="""\
  # the model "digits" of the package
  adadiff train digits --out runs/digits

  # the same network without exits
  adadiff train digits --plain --out runs/plain

  # exits for a finished network, which does not change
  adadiff train digits_frozen --exit-options head=mlp

  # an earlier run with other settings
  adadiff train runs/digits/config.json --steps 20000 \\
      --out runs/longer

  # several processes: one for each GPU, or two on a CPU
  accelerate launch -m adadiff train \\
      canvases_scratch --precision bfloat16
  torchrun --nproc_per_node 2 -m adadiff train \\
      canvases_scratch""",
        notes="Data imagenet256_features is a folder of 0.npy, 1.npy, ...: each a pair (moments, label), moments "
        "float32 [8, 32, 32], the mean and the logarithm of the variance of the autoencoder's latents, not scaled. "
        "U-ViT's scripts/extract_imagenet_feature.py writes such files. If the run is interrupted, the same command "
        "resumes it: after Ctrl-C from where it stopped, after a crash from the last checkpoint.",
    ),
    "distill": Page(
        summary="make a few-step student and an oracle for a cascade",
        usage="MODEL --data DATA --out FILE\n                       [options]",
        description="Distil a model into a student of few steps (progressive distillation), train an oracle that tells "
        "the student's images from real ones, and write both to the file --out. With --policy cascade:FILE, `adadiff "
        "sample` draws every sample with the student first; the model then refines, or draws anew, the share of them "
        "with the worst scores of the oracle.",
        examples="""\
  # the cascade "digits_cascade" of the package
  adadiff distill digits --data digits \\
      --out cascade.safetensors

  # two steps, from 16 by way of 8 and 4
  adadiff distill digits --data digits --steps 2 \\
      --halvings 3 --out cascade.safetensors""",
        notes="If the run is interrupted, the same command goes on from the last halving, which is kept in FILE.state "
        "until the end.",
    ),
    "convert": Page(
        summary="convert a checkpoint of another project",
        usage="SOURCE DEST [options]",
        description="Convert a checkpoint of U-ViT, DiT, AdaDiff, DuoDiff or diffusers, or of an earlier version of "
        "this package, so that the other commands can use it. The converted model is written to the file DEST.",
        examples="""\
  adadiff convert DiT-XL-2-256x256.pt dit_xl.safetensors
  adadiff convert imagenet256_uvit_huge.pth \\
      uvit_huge.safetensors --preset imagenet256_uvit_huge
  adadiff convert 75000.ckpt adadiff_cifar10.safetensors \\
      --preset cifar10_uvit_small

  # a folder of diffusers
  adadiff convert DiT-XL-2-256 dit_xl.safetensors \\
      --served-by dit""",
        notes="No code of a checkpoint is run: only tensors and plain values are read from pickle files.\n\n"
        f"presets: {', '.join(PRESETS)}",
    ),
    "data": Page(
        summary="make the data set of letters from installed fonts",
        usage="NAME --out FILE.npz [options]",
        description="Draw the letters A to Z and a to z and the digits 0 to 9 in hundreds of free typefaces of Debian, "
        "32x32 grey pixels each, for `adadiff train`. The images and their labels are written to the file --out. If "
        "fonts are missing, the command says which packages to install.",
        examples="""\
  adadiff data letters --out letters.npz

  # every family, kept or left out
  adadiff data letters --list""",
        notes="`adadiff train letters_base` trains on letters.npz in the current folder.\n\n"
        "Fonts are found by their paths and SHA-256. With the releases of Pillow and FreeType that the list of "
        "families names, the images are the same, bit for bit.",
    ),
    "reproduce": Page(
        summary="draw and evaluate as the authors published",
        usage="[PRESET] [options]",
        description="Convert released weights, draw as many samples as their authors evaluated, with their solver, "
        "steps and guidance, and print the Fréchet distance beside the published one. This runs `adadiff convert`, "
        "`sample` and `evaluate`, shows these commands, and writes their results to the folder --out; the same command "
        "goes on where it was interrupted. Several processes (torchrun) share the samples; one more call evaluates "
        "them. Without a preset, the table of published results is shown.",
        examples="""\
  adadiff reproduce

  adadiff reproduce imagenet256_uvit_huge \\
      --weights imagenet256_uvit_huge.pth --decoder vae \\
      --reference stats.npz --features inception:FILE \\
      --out runs/reproduced""",
        notes="Labels are spread evenly, 50 of each class of ImageNet; the authors draw them at random. Distances from "
        "other tools, or of fewer samples, are not comparable. --policy samples with exits, if the weights have some.",
    ),
}
EXAMPLES = {name: page.examples for name, page in PAGES.items()}
