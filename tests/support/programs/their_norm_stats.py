"""A norm-stats script: `their_norm_stats.py --config-name NAME`."""

import numpy as np
import tyro

import openpi.shared.normalize as normalize
import openpi.training.data_loader as _data_loader
import openpi.transforms as transforms
import their_config


class RemoveStrings(transforms.DataTransformFn):
    def __call__(self, x: dict) -> dict:
        return {k: v for k, v in x.items() if not np.issubdtype(np.asarray(v).dtype, np.str_)}


def main(config_name: str, max_frames: int | None = None) -> None:
    config = their_config.get_config(config_name)
    data_config = config.data.create(config.assets_dirs, config.model)
    dataset = _data_loader.create_torch_dataset(data_config, config.model.action_horizon, config.model)
    dataset = _data_loader.TransformedDataset(
        dataset,
        [*data_config.repack_transforms.inputs, *data_config.data_transforms.inputs, RemoveStrings()],
    )
    shuffle = max_frames is not None and max_frames < len(dataset)
    num_batches = (max_frames if shuffle else len(dataset)) // config.batch_size
    loader = _data_loader.TorchDataLoader(
        dataset,
        local_batch_size=config.batch_size,
        num_workers=config.num_workers,
        shuffle=shuffle,
        num_batches=num_batches,
    )
    stats = {key: normalize.RunningStats() for key in ("state", "actions")}
    for batch in loader:
        for key in stats:
            stats[key].update(np.asarray(batch[key]))
    norm_stats = {key: running.get_statistics() for key, running in stats.items()}
    normalize.save(config.assets_dirs / data_config.asset_id, norm_stats)
    print(f"{num_batches} batches")


if __name__ == "__main__":
    tyro.cli(main)
