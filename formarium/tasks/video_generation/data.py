"""Reading and writing videos: GIF, mp4 and other films, folders of frames.

folder/name.mp4, folder/name.gif, folder/name/0001.png ...    split by the seed, a fifth of the videos held out
folder/train/..., folder/val/...                              as given (valid, validation and test are understood too)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from formarium.errors import BadInput, MissingExtra
from formarium.task import Data, Sample, file_stem
from formarium.tasks.video_generation.masks import condition_mask

FILMS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
FRAMES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
KEEP = 500_000_000  # bytes of decoded videos that a data set holds on to


# decoding -----------------------------------------------------------------------------------------------------------


def decode(path: str | Path) -> np.ndarray:
    """A film, GIF, image or folder of frames as uint8 RGB [frames, height, width, 3]. Raises BadInput for what can't be decoded whole."""
    path = Path(path)
    try:
        if path.is_dir():
            frames = [_image(p) for p in _frames_of(path)]
        elif path.suffix.lower() in FILMS:
            frames = _film(path)
        else:
            with Image.open(path) as image:
                frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
    except (MissingExtra, BadInput):
        raise
    except Exception as e:  # decoders raise all sorts of things
        raise BadInput(
            str(path), expected="a video that decodes", got=f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
        ) from None
    if not frames:
        raise BadInput(str(path), expected="a video", got="no frames")
    shapes = {f.shape for f in frames}
    if len(shapes) > 1:
        sizes = ", ".join(sorted(f"{s[1]}x{s[0]}" for s in shapes))
        raise BadInput(str(path), expected="frames of one size", got=sizes)
    return np.stack(frames)


def _image(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _film(path: Path) -> list[np.ndarray]:
    av = _av()
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise BadInput(str(path), expected="a video", got="a file without a video stream")
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise MissingExtra("av", "video") from None
    return av


def _frames_of(folder: Path) -> list[Path]:
    """The images right in a folder, by name; numbers in names count as numbers (2 before 10)."""
    import re

    def key(p: Path) -> list[Any]:
        return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", p.stem)]

    return sorted((p for p in folder.iterdir() if p.suffix.lower() in FRAMES and p.is_file()), key=key)


def _videos_in(folder: Path) -> list[Path]:
    """Films and GIFs below a folder, and folders of frames."""
    found = [p for p in folder.rglob("*") if p.is_file() and p.suffix.lower() in (*FILMS, ".gif")]
    found += [d for d in [folder, *folder.rglob("*")] if d.is_dir() and _frames_of(d)]
    return sorted(found)


# data sets ----------------------------------------------------------------------------------------------------------


@dataclass
class Clips:
    """Clips in memory: uint8 [frames, height, width, channels] each, ids, and the condition they are evaluated under ("" as the model has
    it)."""

    clips: Sequence[np.ndarray]
    ids: list[str]
    condition: str = ""

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Sample:
        sample: Sample = {"video": self.clips[index], "id": self.ids[index]}
        return {**sample, "condition": self.condition} if self.condition else sample


@dataclass
class Windows:
    """Windows of video files: (path, first frame) each; `frames` frames, `stride` apart. Videos are kept decoded up to KEEP bytes."""

    root: Path
    places: list[tuple[Path, int]]
    frames: int
    stride: int = 1
    condition: str = ""
    kept: dict[Path, np.ndarray] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Sample:
        path, first = self.places[index]
        video = self.kept.get(path)
        if video is None:
            video = decode(path)
            if sum(v.nbytes for v in self.kept.values()) + video.nbytes <= KEEP:
                self.kept[path] = video
        name = path.relative_to(self.root).as_posix() if path != self.root else path.name
        sample: Sample = {"video": video[first : first + self.frames * self.stride : self.stride], "id": f"{name}:{first}"}
        return {**sample, "condition": self.condition} if self.condition else sample


def read(
    path: str | Path, *, num_frames: int = 16, size: int | None = None, stride: int = 1, condition: str = "", holdout: float = 0.2,
    seed: int = 0,
) -> Data:  # fmt: skip
    """Clips of `num_frames` frames, every `stride`-th one, cut without overlap from the videos of a folder.

    size: side that a model made for these data has (by default the model's own; frames are scaled and cropped to a square either way).
    condition: what is unknown in evaluation (see masks.CONDITIONS); by default as the model's card has it. holdout: share of videos (at
    least one) that becomes "val" where the folder has no split of its own; of a single video, the last windows.
    Raises BadInput: no such path, no videos, none that decodes, none long enough, too few to split.
    """
    root = Path(path)
    if not root.exists():
        raise BadInput(str(path), expected="a folder of videos, or a video", got="no such path")
    given = (
        {_SPLITS[d.name.lower()]: d for d in sorted(root.iterdir()) if d.is_dir() and d.name.lower() in _SPLITS} if root.is_dir() else {}
    )
    split_given = "train" in given and len(given) > 1
    folders = given if split_given else {"all": root}
    found = {split: _videos_in(folder) if folder.is_dir() else [folder] for split, folder in folders.items()}
    if not any(found.values()):
        raise BadInput(str(path), expected=f"videos (.gif, {', '.join(FILMS[:4])} ...) or folders of frames", got="none in it")
    span, notes = (num_frames - 1) * stride + 1, []
    kept: dict[Path, np.ndarray] = {}
    lengths, held, bad, short = {}, 0, [], []
    for video in (v for videos in found.values() for v in videos):
        try:
            pixels = decode(video)
        except BadInput as e:
            bad.append((video, e))
            continue
        lengths[video] = len(pixels)
        if len(pixels) < span:
            short.append(video)
        elif held + pixels.nbytes <= KEEP:
            kept[video], held = pixels, held + pixels.nbytes
    name_of = lambda p: p.relative_to(root).as_posix() if p != root else p.name  # noqa: E731
    if bad:
        notes.append(f"{len(bad)} videos that can't be decoded left out: {', '.join(name_of(p) for p, _ in bad[:5])}")
    if short:
        notes.append(f"{len(short)} clips shorter than {span} frames left out: {', '.join(name_of(p) for p in short[:5])}")
    if not lengths:
        raise BadInput(str(path), expected="videos that decode", got=str(bad[0][1]))
    if len(short) == len(lengths):
        longest = max(lengths.values())
        raise BadInput(
            str(path), expected=f"clips of at least {span} frames", got=f"at most {longest}", fix="a smaller num_frames or stride"
        )

    def windows(videos: Sequence[Path]) -> list[tuple[Path, int]]:
        return [(v, i) for v in videos for i in range(0, lengths[v] - span + 1, span)]

    usable = {split: [v for v in videos if lengths.get(v, 0) >= span] for split, videos in found.items()}
    if split_given:
        places = {split: windows(videos) for split, videos in usable.items()}
        if "val" not in places:
            places["val"] = places["test"]
    elif len(usable["all"]) == 1:
        every = windows(usable["all"])
        last = max(1, round(holdout * len(every)))
        places = {"train": every[:-last], "val": every[-last:]}
    else:
        videos = [usable["all"][i] for i in np.random.default_rng(seed).permutation(len(usable["all"]))]
        last = max(1, round(holdout * len(videos)))
        places = {"train": windows(sorted(videos[:-last])), "val": windows(sorted(videos[-last:]))}
    empty = [split for split in ("train", "val") if not places[split]]
    if empty:
        raise BadInput(str(path), expected=f"clips of {span} frames for training and for testing", got=f"none for {' and '.join(empty)}")
    splits = {split: Windows(root, p, num_frames, stride, condition, kept) for split, p in places.items()}
    args: dict[str, Any] = {"num_frames": num_frames, "channels": 3, **({"frame_size": size} if size else {})}
    return Data(root.name, "video-generation", {**splits}, args, (), notes, {"path": str(root)})


def inputs(paths: Sequence[str | Path]) -> Clips:
    """Videos to go on from: films, GIFs, folders of them, folders of frames, single images (one known frame). BadInput for others."""
    found: list[Path] = []
    for entry in paths:
        p = Path(entry)
        if not p.exists():
            raise BadInput(str(entry), expected="a video, an image or a folder", got="no such path")
        if p.is_dir():
            inside = _videos_in(p)
            if not inside:
                raise BadInput(str(entry), expected="a folder with videos or frames", got="none in it")
            found += inside
        else:
            found.append(p)
    if not found:
        raise BadInput("videos", expected="at least one", got="none")
    return Clips([decode(p) for p in found], [str(p) for p in found])


def from_memory(value: Any, index: int) -> Sample:
    """A clip in memory: an array [frames, height, width(, channels)], uint8 or float in [0, 1], or a tensor [frames, channels, height,
    width]."""
    import torch

    name, x = f"input {index}", value
    if isinstance(x, Mapping):
        if "video" not in x:
            raise BadInput(name, expected="a sample with a video", got=f"one with {', '.join(x) or 'nothing'}")
        return {"id": name, **x}
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu().float().numpy() if x.is_floating_point() else x.detach().cpu().numpy()
        x = x.transpose(0, 2, 3, 1) if x.ndim == 4 else x
    if not isinstance(x, np.ndarray):
        raise BadInput(name, expected="a path, or a clip as an array or tensor", got=type(value).__name__)
    x = x[..., None] if x.ndim == 3 else x
    if x.ndim != 4 or x.shape[-1] not in (1, 3) or not x.size:
        raise BadInput(name, expected="a clip [frames, height, width, 1 or 3]", got=f"{[*value.shape]}")
    if x.dtype != np.uint8:
        if not np.isfinite(x).all() or x.min() < 0 or x.max() > 1:
            raise BadInput(name, expected="uint8, or values in [0, 1]", got=f"{x.dtype} from {x.min():g} to {x.max():g}")
        x = (x * 255).round().astype(np.uint8)
    return {"video": x, "id": name}


# into batches -------------------------------------------------------------------------------------------------------


@dataclass
class Prepare:
    """Raw sample to what the batch holds: square frames of the model's size and channels in [0, 1], and the mask of its condition.

    preprocessing: size, num_frames, channels, condition, known (frames given in prediction; 0: half). recipe: hflip, the chance to mirror a
    clip. For prediction a clip that is too short is filled up: what is missing is generated, be it all but one frame.
    """

    preprocessing: Mapping[str, Any]
    recipe: Mapping[str, Any] | None = None

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        p, video, name = self.preprocessing, sample["video"], str(sample.get("id", "clip"))
        frames, size = p["num_frames"], p["size"]
        if len(video) < frames and self.recipe is not None:
            raise BadInput(name, expected=f"a clip of {frames} frames", got=f"{len(video)}")
        pixels = self.pixels(video[:frames], size)  # t c h w
        condition = sample.get("condition") or p.get("condition", "prediction")
        if len(pixels) < frames:  # to be gone on with, whatever the condition
            mask = np.ones((frames, size, size), np.float32)
            mask[: len(pixels)] = 0
            pixels = np.concatenate([pixels, np.zeros((frames - len(pixels), *pixels.shape[1:]), np.float32)])
        else:
            fixed = np.random.default_rng(0) if self.recipe is None else rng
            mask = sample["mask"] if "mask" in sample else condition_mask(condition, frames, size, size, fixed, known=p.get("known", 0))
        if self.recipe and rng.random() < self.recipe.get("hflip", 0.0):
            pixels, mask = pixels[..., ::-1], mask[..., ::-1]
        out = {"video": np.ascontiguousarray(pixels), "mask": np.ascontiguousarray(mask, dtype=np.float32), "id": name}
        if out["mask"].shape != (frames, size, size):
            raise BadInput(f"{name}'s mask", expected=f"[{frames}, {size}, {size}]", got=f"{[*out['mask'].shape]}")
        return out

    def pixels(self, video: np.ndarray, size: int) -> np.ndarray:
        """float32 [frames, channels, size, size] in [0, 1]: the shorter side scaled to `size`, the centre cut out."""
        h, w, c = video.shape[1:]
        wanted = self.preprocessing.get("channels", 3)
        if c != wanted and {c, wanted} != {1, 3}:
            raise BadInput("frames", expected=f"{wanted} channels", got=str(c))
        if c == 3 and wanted == 1:
            video = (video @ np.array([0.299, 0.587, 0.114], np.float32)).round().astype(np.uint8)[..., None]
        if (h, w) != (size, size):
            scale = size / min(h, w)
            to = (max(size, round(w * scale)), max(size, round(h * scale)))
            video = np.stack([_resized(frame, to) for frame in video])
            top, left = (video.shape[1] - size) // 2, (video.shape[2] - size) // 2
            video = video[:, top : top + size, left : left + size]
        out = video.transpose(0, 3, 1, 2).astype(np.float32) / 255
        return np.repeat(out, 3, 1) if c == 1 and wanted == 3 else out


def _resized(frame: np.ndarray, to: tuple[int, int]) -> np.ndarray:
    image = Image.fromarray(frame if frame.shape[2] == 3 else frame[..., 0])
    out = np.asarray(image.resize(to, Image.Resampling.BICUBIC))
    return out if out.ndim == 3 else out[..., None]


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """The batch that `model.py` documents."""
    import torch

    return {
        "video": torch.from_numpy(np.stack([s["video"] for s in samples])),
        "mask": torch.from_numpy(np.stack([s["mask"] for s in samples])),
        "id": [s["id"] for s in samples],
    }


# out ----------------------------------------------------------------------------------------------------------------


def write(prediction: Any, batch: Mapping[str, Any], folder: Path, fps: int = 8) -> list[Path]:
    """A GIF and an mp4 of every clip; small frames are enlarged to at least 64 pixels. Without the package `av`, the GIF alone."""
    folder, paths = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    ids = batch.get("id") or [str(i) for i in range(len(prediction.video))]
    for video, name in zip(prediction.video, ids, strict=True):
        pixels = to_uint8(video)
        stem = folder / file_stem(str(name).replace(":", "_at_"))
        paths.append(write_gif(pixels, stem.with_name(stem.name + ".gif"), fps))
        try:
            paths.append(write_mp4(pixels, stem.with_name(stem.name + ".mp4"), fps))
        except MissingExtra:
            continue
    return paths


def to_uint8(video: Any) -> np.ndarray:
    """float tensor [frames, channels, height, width] in [0, 1] (of latents: their first three channels, scaled) to uint8 RGB, enlarged
    where small."""
    x = video.detach().float().cpu().numpy()
    if x.shape[1] not in (1, 3):
        x = x[:, :3] if x.shape[1] > 3 else x[:, :1]
        x = (x - x.min()) / max(float(x.max() - x.min()), 1e-6)
    x = (x.clip(0, 1) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    x = np.repeat(x, 3, 3) if x.shape[3] == 1 else x
    times = -(-64 // min(x.shape[1:3]))
    return np.ascontiguousarray(x.repeat(times, 1).repeat(times, 2))


def write_gif(pixels: np.ndarray, path: Path, fps: int = 8) -> Path:
    """uint8 [frames, height, width, 3] as a GIF that repeats."""
    frames = [Image.fromarray(f) for f in pixels]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0, disposal=2)
    return path


def write_mp4(pixels: np.ndarray, path: Path, fps: int = 8) -> Path:
    """uint8 [frames, height, width, 3] as H.264 (MPEG-4 part 2 where that encoder isn't there); odd sides lose a pixel."""
    av = _av()
    h, w = pixels.shape[1] // 2 * 2, pixels.shape[2] // 2 * 2
    try:
        av.codec.Codec("libx264", "w")
        codec, options = "libx264", {"crf": "12"}
    except Exception:  # av names its error differently from version to version
        codec, options = "mpeg4", {"qscale": "2"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = w, h, "yuv420p"
        for frame in pixels[:, :h, :w]:
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path
