"""Bodies of requests and replies: those of OpenAI's images API, with additional fields."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import ServiceError, invalid, shown

MOST_PROMPT = 4096  # characters


class ImageRequest(BaseModel):
    """Body of POST /v1/images/generations. null is the same as a missing field."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str | None = Field(None, max_length=256, description="one of /v1/models; default: the first of them")
    prompt: str | None = Field(
        None, max_length=MOST_PROMPT, description="for text-to-image models; or a class name, if the model has them"
    )
    class_label: int | None = Field(None, ge=0, description="for class-conditional models; default: no class")
    n: int | None = Field(None, ge=1, description="number of images; image i has the seed `seed` + i; default: 1")
    size: str | None = Field(None, max_length=32, description="WIDTHxHEIGHT, which must be the model's, or auto")
    seed: int | None = Field(None, ge=0, lt=2**63, description="default: a random one, which the reply contains")
    num_inference_steps: int | None = Field(None, ge=1, description="evaluations of the network")
    guidance_scale: float | None = Field(None, ge=0, allow_inf_nan=False, description="1 (default): no guidance")
    solver: str | None = Field(None, max_length=64, description="default: ddim")
    policy: str | None = Field(
        None, max_length=256, description="what each image may skip: exit:..., cache:..., reuse:..., or a preset"
    )
    response_format: Literal["b64_json", "png"] | None = Field(None, description="default: b64_json")
    output_format: Literal["png"] | None = None
    stream: bool | None = Field(None, description="server-sent events, with previews; default: false")
    partial_images: int | None = Field(None, ge=0, description="previews in a stream; default: 0")
    user: str | None = Field(None, max_length=256, description="accepted for OpenAI's clients; not used")


def parse(body: Mapping[str, Any]) -> ImageRequest:
    """The request in a JSON object. Raises ServiceError, which names the first invalid field."""
    if unknown := sorted(set(body) - set(ImageRequest.model_fields)):
        known = ", ".join(ImageRequest.model_fields)
        raise invalid(f"unknown field {shown(unknown[0])}; there are {known}", unknown[0][:64], "unknown_field")
    try:
        return ImageRequest.model_validate(body)
    except (ValidationError, OverflowError) as error:
        raise _refused(body, error) from None


def _refused(body: Mapping[str, Any], error: ValidationError | OverflowError) -> ServiceError:
    if isinstance(error, OverflowError):  # an integer too large for a float
        return invalid("guidance_scale is too large", "guidance_scale")
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = str(first["loc"][0])
    if param == "response_format" and body[param] == "url":
        return invalid("response_format 'url' is not served, since images are not kept; use b64_json or png", param)
    return invalid(f"{param}: {first['msg']}, got {shown(body.get(param))}", param)


class ImageDetails(BaseModel):
    """How one image was drawn. exit_layers: number of blocks that ran at each step, for the conditional half;
    exit_layers_unconditional: for the other half, with guidance. share_left_out: of the network's blocks.
    seconds_waiting: in the queue. seconds_running: from the first to the last step."""

    seed: int
    steps: int
    num_layers: int
    mean_exit_layer: float
    share_left_out: float
    seconds_waiting: float
    seconds_running: float
    exit_layers: list[int]
    exit_layers_unconditional: list[int] | None = None


class ImageData(BaseModel):
    b64_json: str
    adadiff: ImageDetails


class RequestDetails(BaseModel):
    """Summary of a request: mean exit layer and share over its images, and the longest of their times."""

    request_id: str
    model: str
    policy: str
    solver: str
    seed: int
    steps: int
    guidance_scale: float
    num_layers: int
    mean_exit_layer: float
    share_left_out: float
    seconds_waiting: float
    seconds_running: float


class ImagesReply(BaseModel):
    created: int
    data: list[ImageData]
    size: str
    output_format: Literal["png"] = "png"
    adadiff: RequestDetails


class PreviewDetails(BaseModel):
    """index: number of the image within the request. step: number of finished steps. exit_layers: as far as known."""

    index: int
    seed: int
    step: int
    steps: int
    exit_layers: list[int]


class PartialImageEvent(BaseModel):
    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    b64_json: str
    partial_image_index: int
    created_at: int
    size: str
    output_format: Literal["png"] = "png"
    background: Literal["opaque"] = "opaque"
    quality: Literal["auto"] = "auto"
    adadiff: PreviewDetails


class CompletedDetails(ImageDetails):
    index: int


class CompletedEvent(BaseModel):
    type: Literal["image_generation.completed"] = "image_generation.completed"
    b64_json: str
    created_at: int
    size: str
    output_format: Literal["png"] = "png"
    background: Literal["opaque"] = "opaque"
    quality: Literal["auto"] = "auto"
    adadiff: CompletedDetails
