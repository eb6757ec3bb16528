"""One picture as numbers: any kind of image file to grey levels, grey levels to what a vision model reads."""

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, refuse

Array = np.ndarray[Any, Any]
BILINEAR = 2  # PIL's number
PROCESSOR_FILE = "preprocessor_config.json"


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """How pictures become a model's `pixel_values`: resized, scaled, normalised, as transformers' ViTImageProcessor.

    Attributes:
        size: (height, width). Both sides are resized to it by themselves: the ratio of the sides is not kept.
        channels: 3 (grey becomes RGB) or 1 (RGB becomes its luma).
        mean: Of each channel, taken away after the scaling.
        std: Of each channel, divided by.
        rescale_factor: What a grey level is multiplied by.
        resample: PIL's number of the filter; 2 is bilinear.

    >>> processor = ImageProcessor((2, 2), mean=(0.5,) * 3, std=(0.5,) * 3)
    >>> processor(np.full((1, 2, 2, 3), 255, np.uint8)).shape, processor(np.full((1, 2, 2, 3), 255, np.uint8)).max()
    ((1, 3, 2, 2), np.float32(1.0))
    """

    size: tuple[int, int]
    channels: int = 3
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255
    resample: int = BILINEAR

    def __post_init__(self) -> None:
        wrong = [f"size {self.size}: two whole numbers above 0"] if min(self.size) < 1 else []
        wrong += [] if self.channels in (1, 3) else [f"num_channels {self.channels}: pictures have 1 or 3"]
        wrong += [
            f"{name} has {len(values)} numbers for {self.channels} channels"
            for name, values in (("image_mean", self.mean), ("image_std", self.std))
            if len(values) != self.channels
        ]
        wrong += [] if min(self.std, default=1) > 0 else [f"image_std {list(self.std)}: numbers above 0"]
        wrong += [] if self.resample in range(6) else [f"resample {self.resample}: PIL has the filters 0 to 5"]
        refuse(DataError, "the image processor does not fit its model", wrong)

    def __call__(self, images: Array) -> Array:
        """Map grey levels `[B, H, W, C]` uint8, of the model's size, to `pixel_values` `[B, C, H, W]` float32."""
        return np.asarray(self._normalise(images.transpose(0, 3, 1, 2).astype(np.float32) * self.rescale_factor))

    def unit(self, pixel_values: Any) -> Any:
        """Map `pixel_values`, numpy's or JAX's, back to images `[B, C, H, W]` with values from 0 to 1."""
        mean, std = self._each_channel
        return (pixel_values * std + mean) / (255 * self.rescale_factor)

    def prepare(self, images: Any) -> Any:
        """Map images `[B, C, H, W]` with values from 0 to 1, numpy's or JAX's, to `pixel_values`: `unit` undone."""
        return self._normalise(images * (255 * self.rescale_factor))

    normalise = prepare

    def _normalise(self, images: Any) -> Any:
        mean, std = self._each_channel
        return (images - mean) / std

    @property
    def _each_channel(self) -> tuple[Array, ...]:
        return tuple(np.asarray(x, np.float32).reshape(1, -1, 1, 1) for x in (self.mean, self.std))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `preprocessor_config.json`, under the name that tokenizers have for it: `save_model` takes either."""
        (Path(folder) / PROCESSOR_FILE).write_text(json.dumps(self.to_json(), indent=2), encoding="utf-8")

    def to_json(self) -> dict[str, Any]:
        """Return the content of a `preprocessor_config.json` that transformers reads."""
        return {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": self.size[0], "width": self.size[1]},
            "resample": self.resample,
            "do_rescale": True,
            "rescale_factor": self.rescale_factor,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }


def read_processor(folder: str | Path, *, size: int | Sequence[int], channels: int = 3) -> ImageProcessor:
    """Return the processor of a model folder: its `preprocessor_config.json`, checked against the model's own size.

    Args:
        folder: The folder; without the file, mean and std are 0.5, as in transformers' ViT.
        size: The model's `image_size`, one number or (height, width).
        channels: The model's `num_channels`.

    Returns:
        The processor.

    Raises:
        DataError: The file asks for what is not done here (cropping, padding, another size than the model's).

    >>> read_processor("nowhere", size=32, channels=1)
    ImageProcessor(size=(32, 32), channels=1, mean=(0.5,), std=(0.5,), rescale_factor=0.00392156862745098, resample=2)
    """
    height, width = (size, size) if isinstance(size, int) else size
    file = Path(folder) / PROCESSOR_FILE
    if not file.is_file():
        return ImageProcessor((height, width), channels, (0.5,) * channels, (0.5,) * channels)
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        given = _size(raw.get("size", {"height": height, "width": width}))
        mean, std = (_each(raw.get(key, 0.5), channels) for key in ("image_mean", "image_std"))
        scale, resample = float(raw.get("rescale_factor", 1 / 255)), int(raw.get("resample", BILINEAR))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise DataError(f"{file}: not an image processor's config ({type(error).__name__}: {error})") from None
    problems = [f"{key} is not supported" for key in ("do_center_crop", "do_pad") if raw.get(key)]
    if given is None:
        problems.append(f"size {raw['size']}: only height and width are supported")
    elif raw.get("do_resize", True) and given != (height, width):
        problems.append(f"size is {given}, the model's image_size {(height, width)}")
    refuse(DataError, f"{file}: what it asks for is not done here", problems)
    if not raw.get("do_normalize", True):
        mean, std = (0.0,) * channels, (1.0,) * channels
    return ImageProcessor((height, width), channels, mean, std, scale if raw.get("do_rescale", True) else 1.0, resample)


def _each(value: Any, channels: int) -> tuple[float, ...]:
    """Return one number a channel, of a list or of one number for all."""
    return (float(value),) * channels if isinstance(value, (int, float)) else tuple(map(float, value))


def _size(value: Any) -> tuple[int, int] | None:
    if isinstance(value, Mapping):
        return (int(value["height"]), int(value["width"])) if {"height", "width"} <= set(value) else None
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def grey_levels(picture: Any, processor: ImageProcessor) -> Array:
    """Return a picture as the grey levels `[H, W, C]` uint8 that its processor scales, in the model's size.

    Turned as its EXIF says; palettes looked up; 16 bits to 8; what is transparent shows white; grey to RGB, or RGB to
    its luma; then resized.

    Args:
        picture: A path, the bytes of a file, an image of PIL, or an array `[H, W]` or `[H, W, C]` (1, 3 or 4 channels)
            of uint8 or uint16.
        processor: Size, channels and filter.

    Raises:
        DataError: It cannot be read; the reason.
    """
    from PIL import Image

    image = picture if isinstance(picture, Image.Image) else _open(picture)
    mode = "RGB" if processor.channels == 3 else "L"
    resized = _plain(image).convert(mode).resize(processor.size[::-1], Image.Resampling(processor.resample))
    return np.asarray(resized).reshape(*processor.size, processor.channels)


def size_of(picture: Any) -> tuple[int, int]:
    """Return (height, width) of a picture, turned as its EXIF says. Argument and error as of `grey_levels`."""
    from PIL import Image

    image = picture if isinstance(picture, Image.Image) else _open(picture)
    return int(image.height), int(image.width)


def _open(picture: Any) -> Any:
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(picture, np.ndarray):
        return Image.fromarray(_eight_bits(picture))
    try:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # a JPEG of some phones, whose further pictures are previews
                raise DataError(f"it holds {frames} pictures: give one in a file")
            return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise DataError("no such file") from None
    except UnidentifiedImageError:
        raise DataError("not an image of a kind that is read, or a damaged one") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"a damaged image ({error})") from None


def _eight_bits(array: Array) -> Array:
    """Return an array as PIL takes it: uint8, without an axis for a single channel."""
    if array.dtype == np.uint16:
        array = (array.astype(np.uint32) * 255 + 32767) // 65535
    elif array.dtype != np.uint8:
        raise DataError(f"its numbers are {array.dtype}: give grey levels, uint8 (or uint16)")
    array = array.astype(np.uint8)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)) or 0 in array.shape:
        raise DataError(f"its shape is {array.shape}: [H, W] or [H, W, C] with 1, 3 or 4 channels last is expected")
    return array


def _plain(image: Any) -> Any:
    """Return a picture of 8 bits without transparency."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits; PIL would cut them off at 255
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise DataError(f"grey levels from {levels.min()} to {levels.max()}: 8 or 16 bits are read")
        return Image.fromarray(_eight_bits(levels.astype(np.uint16)))
    if image.mode == "F":
        raise DataError("grey levels as floats: 8 or 16 bits are read")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image
