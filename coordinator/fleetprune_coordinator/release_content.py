"""What a release is made of, and what is signed about it."""

import hashlib
from dataclasses import dataclass, field

from fleetprune.manifest import Delta, Manifest, Requirements, Training, manifest_path


@dataclass(frozen=True, slots=True)
class ReleaseContent:
    """What one device class gets: the files, and the fields of its `Manifest`."""

    onnx: bytes
    golden: bytes
    """An .npz with `x` (n, *input_shape) float32 and `y` (n, classes) float32."""
    input_shape: tuple[int, ...]
    """Of one sample, without the batch axis."""
    deltas: tuple[tuple[str, bytes], ...] = ()
    """SHA-256 of a model that may be installed, and the file that makes this one from it."""
    tolerance: float = 1e-3
    requires: Requirements = field(default_factory=Requirements)
    smaller: str | None = None
    max_latency_ms: float | None = None
    max_rss_mb: float | None = None
    min_agreement: float | None = None
    labels: tuple[str, ...] = ()
    macs: int = 0
    peak_activation_bytes: int = 0
    accuracy: float | None = None
    samples: int = 0
    round: int = 0
    mask_version: int = 0
    training: Training = field(default_factory=Training)
    licence: str = ""

    def manifest(self, release: int, device_class: str) -> Manifest:
        """The manifest that devices of the class will verify and follow."""
        base = f"releases/{device_class}/{release}"
        return Manifest(
            release=release,
            device_class=device_class,
            model=f"{base}/model.onnx",
            sha256=_sha256(self.onnx),
            size=len(self.onnx),
            golden=f"{base}/golden.npz",
            tolerance=self.tolerance,
            requires=self.requires,
            deltas=tuple(
                Delta(
                    base=installed,
                    target=f"{base}/from-{installed}.delta",
                    sha256=_sha256(data),
                    size=len(data),
                )
                for installed, data in self.deltas
            ),
            smaller=self.smaller,
            max_latency_ms=self.max_latency_ms,
            max_rss_mb=self.max_rss_mb,
            min_agreement=self.min_agreement,
            labels=self.labels,
            input_shape=self.input_shape,
            macs=self.macs,
            peak_activation_bytes=self.peak_activation_bytes,
            accuracy=self.accuracy,
            samples=self.samples,
            round=self.round,
            mask_version=self.mask_version,
            training=self.training,
            licence=self.licence,
        )

    def files(self, manifest: Manifest) -> dict[str, bytes]:
        """Target path to content of everything that is signed for `manifest`."""
        path = manifest_path(manifest.device_class, manifest.release)
        deltas = {
            delta.target: data
            for delta, (_, data) in zip(manifest.deltas, self.deltas, strict=True)
        }
        return {
            manifest.model: self.onnx,
            manifest.golden: self.golden,
            **deltas,
            path: manifest.to_bytes(),
        }


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
