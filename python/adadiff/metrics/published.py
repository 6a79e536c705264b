"""Published results of networks: solver, steps and guidance of their authors' evaluation, and the FID."""

from collections.abc import Mapping
from dataclasses import dataclass

UVIT = "baofff/U-ViT, README and configs"
DIT = "facebookresearch/DiT, README and sample_ddp.py"
SIT = "willisma/SiT, README and run.sh"


@dataclass(frozen=True)
class Published:
    """fid: Fréchet distance of Inception features, of n samples. reference: the authors' name of the file with the
    statistics of real images. guidance_scale: as in diffusers; 1: none. classes: labels are spread evenly over them;
    0: no classes."""

    solver: str
    steps: int
    fid: float
    reference: str
    source: str
    guidance_scale: float = 1.0
    classes: int = 0
    n: int = 50_000


def _imagenet(solver: str, steps: int, guidance: float, fid: float, size: int, source: str = UVIT) -> Published:
    uvit = f"fid_stats_imagenet{size}_guided_diffusion.npz"
    reference = uvit if source == UVIT else f"VIRTUAL_imagenet{size}_labeled.npz"
    return Published(solver, steps, fid, reference, source, guidance, classes=1000)


PUBLISHED: Mapping[str, Published] = {
    "cifar10_uvit_small": Published("euler-maruyama", 1000, 3.11, "fid_stats_cifar10_train_pytorch.npz", UVIT),
    "celeba64_uvit_small": Published("euler-maruyama", 1000, 2.87, "fid_stats_celeba64_train_50000_ddim.npz", UVIT),
    "imagenet64_uvit_mid": _imagenet("dpm-fast", 50, 1.0, 5.85, 64),
    "imagenet64_uvit_large": _imagenet("dpm-fast", 50, 1.0, 4.26, 64),
    "imagenet256_uvit_large": _imagenet("dpm-fast", 50, 1.4, 3.40, 256),
    "imagenet256_uvit_huge": _imagenet("dpm++fast", 50, 1.4, 2.29, 256),
    "imagenet512_uvit_large": _imagenet("dpm-fast", 50, 1.7, 4.67, 512),
    "imagenet512_uvit_huge": _imagenet("dpm++fast", 50, 1.7, 4.05, 512),
    "dit_xl_2_256": _imagenet("ddpm:spacing=respaced", 250, 1.5, 2.27, 256, DIT),
    "dit_xl_2_512": _imagenet("ddpm:spacing=respaced", 250, 1.5, 3.04, 512, DIT),
    "sit_xl_2_256": _imagenet("flow-sde", 250, 1.5, 2.06, 256, SIT),
}
