"""What a setting is, for those who do not know `fleet.toml` by heart."""

from collections.abc import Mapping

OF_RUNS = "settings."
"""Before the name of what a run was told, as against what came of it; means nothing to people."""

_MEANINGS: Mapping[str, str] = {
    "rounds": "rounds of training",
    "auto": "settings that were found out by trying",
    "engine": "what did the devices' work; changes no result",
    "dense.params": "weights of the uncut model",
    "dense.macs": "multiply-accumulates of one inference of the uncut model",
    "devices": "devices in the fleet",
    "input_shape": "of one sample",
    "training.rounds": "rounds of training",
    "training.devices_per_round": "devices that are asked in a round",
    "training.min_devices": "with fewer devices online, a round waits",
    "training.epochs": "times that a device goes over its samples in a round",
    "training.max_steps": "most steps of a device in a round; 0: no limit",
    "training.batch": "samples per step",
    "training.learning_rate": "of the devices, in the first round",
    "training.final_learning_rate_share": "share of the learning rate that is left at the end",
    "training.momentum": "of the devices' optimiser",
    "training.weight_decay": "of the devices' optimiser",
    "training.codec": "how updates are encoded on their way up",
    "training.down_codec": "how models are encoded on their way down",
    "training.top_k": "share of an update's values that is sent",
    "training.round_timeout_s": "seconds that a round waits for answers",
    "training.quorum": "share of answers that ends a round sooner",
    "training.remask_every": "rounds between new choices of units; 0: never after the first",
    "training.last_remask": "last round with a new choice of units; none: half",
    "training.criterion": "how the importance of units is measured",
    "training.score_merge": "how what devices say of a unit becomes one figure",
    "training.first_criterion": "how importance is measured when a trained model is first cut",
    "training.refit": "whether weights that stay make up for those that were cut",
    "training.proximal": "pull of a device's training towards the weights it was sent",
    "training.adjust_logits": "how far devices train against their own label frequencies",
    "training.distill_weight": "weight of what a wider model teaches the narrower one in it",
    "training.student_task_weight": "weight of what labels teach that narrower model",
    "training.mutual_weight": "weight of what the narrower model teaches back",
    "training.fixed_statistics": "share of the rounds after which BatchNorm statistics are fixed",
    "training.fixed_learning_rate": "times the learning rate once statistics are fixed",
    "training.calibration_passes": "passes that measure BatchNorm statistics",
    "training.calibration_devices": "devices that BatchNorm statistics come from; 0: all",
    "training.calibrate_with": "whose samples BatchNorm statistics come from",
    "training.outlier": "times the median device that one device may weigh; 0: no bound",
    "training.stratified": "whether every class has its share of a round",
    "pruning.channel_multiple": "widths are multiples of it",
    "pruning.allocation": "how a cut is shared out among the layers",
    "pruning.granularity": "what is cut away: units, single weights, or both",
    "pruning.pattern": "weights that are pruned together: outputs x inputs, or N of every M",
    "pruning.weight_allocation": "how pruned weights are shared out among the layers",
    "pruning.dense_layers": "layers whose weights all stay",
    "pruning.floor": "of a global cut: share of a layer's uniform width that it keeps at least",
    "pruning.exclude": "layers that stay whole",
    "pruning.minimum": "units that layers keep at least",
    "pruning.multiple": "what the widths of layers are multiples of",
    "schedule.curve": "how budgets tighten",
    "schedule.begin": "round from which budgets tighten",
    "schedule.end": "round from which budgets hold in full",
    "schedule.power": "of a polynomial curve",
    "schedule.initial": "share of the uncut model's costs to begin with",
    "schedule.frequency": "rounds between two steps of the curve",
    "schedule.step": "of a dynamic curve: how much is given up at once",
    "schedule.window": "of a dynamic curve: rounds whose mean loss is looked at",
    "schedule.stable": "of a dynamic curve: a loss that falls by less is stable",
    "schedule.bound": "of a dynamic curve: loss of accuracy at which it backs off",
    "partition.kind": "how samples are split over the devices",
    "partition.alpha": "the smaller, the more devices differ in their labels",
    "partition.labels_per_device": "where devices have few labels each",
    "partition.least": "samples of a device at least",
    "simulation.task": "what the fleet learns",
    "simulation.devices": "devices in the fleet",
    "simulation.samples_per_device": "in the mean; none: all there are",
    "simulation.held_out": "share of its samples that a device judges its model by",
    "simulation.evaluate_every": "rounds between looks at the validation set",
    "simulation.evaluation_samples": "samples of each such look",
    "simulation.auto_rounds": "rounds for trying what is found out, in those of a training",
    "model.factory": "what makes the model",
    "model.initial": "the trained model to begin with",
}
_OF_CLASS: Mapping[str, str] = {
    "macs": "most multiply-accumulates of one inference",
    "flash_bytes": "largest file",
    "ram_bytes": "most memory of one inference",
    "latency_ms": "longest inference, measured on the device",
    "batch": "samples at once, for the limit of memory",
    "multiple": "what widths are multiples of",
    "share": "of the devices, in proportion",
    "kind": "hardware, in the data's own terms",
    "macs_per_s": "multiply-accumulates a second",
    "up_bytes_per_s": "upload",
    "down_bytes_per_s": "download",
    "latency_s": "what each exchange with the coordinator takes",
    "jitter": "how much durations vary",
    "available": "probability to be online when a round begins",
    "drop_out": "probability to fall silent in a round",
    "compute_w": "watts of computing",
    "radio_w": "watts of sending and receiving",
}


def short(name: str) -> str:
    """A setting's name as in `fleet.toml`."""
    return name.removeprefix(OF_RUNS)


def meaning(name: str) -> str:
    """What a setting is; nothing where it is not known."""
    plain = short(name).replace("simulation.partition.", "partition.")
    if known := _MEANINGS.get(plain):
        return known
    table, _, rest = plain.removeprefix("simulation.").partition(".")
    device_class, _, key = rest.rpartition(".")
    if table in {"budgets", "classes"} and (known := _OF_CLASS.get(key)):
        return f"of {device_class}: {known}"
    return ""


def value(text: str | None) -> str:
    """A value that is kept as JSON; nothing where a method has no such setting."""
    return "" if text is None else text.strip('"')
