import yaml


class OmegaConf:
    @staticmethod
    def load(path: object) -> dict:
        with open(str(path)) as file:  # noqa: PTH123
            return yaml.safe_load(file)
