"""What the house promises about itself: who may import whom, what stays importable, and what is not loaded."""

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
import textwrap

import pytest

import paths

HEAVY = ("jax", "torch", "tensorflow", "optax", "orbax", "tyro", "av", "pyarrow", "mujoco", "PIL", "numpy")

OURS = {"openpi", "openpi_client", "openpi_demo", "openpi_positronic", "openpi_rlds", "openpi_sim", "positronic"}

# The documented import paths of the published system.
PUBLIC = {
    "openpi.transforms": ["DataTransformFn", "Group", "compose", "RepackTransform", "Normalize", "Unnormalize"],
    "openpi.models.model": ["Observation", "Actions", "ModelType", "IMAGE_KEYS", "BaseModelConfig", "restore_params"],
    "openpi.models.gemma": ["Config", "get_config"],
    "openpi.models.pi0": ["Pi0", "Pi0Config"],
    "openpi.models.pi0_config": ["Pi0Config"],
    "openpi.models.pi0_fast": ["Pi0FASTConfig"],
    "openpi.models.tokenizer": ["PaligemmaTokenizer", "FASTTokenizer"],
    "openpi.models_pytorch.pi0_pytorch": ["PI0Pytorch"],
    "openpi.policies.aloha_policy": ["AlohaInputs", "AlohaOutputs", "make_aloha_example"],
    "openpi.policies.droid_policy": ["DroidInputs", "DroidOutputs", "make_droid_example"],
    "openpi.policies.libero_policy": ["LiberoInputs", "LiberoOutputs", "make_libero_example"],
    "openpi.policies.policy": ["Policy", "PolicyRecorder"],
    "openpi.policies.policy_config": ["create_trained_policy"],
    "openpi.serving.websocket_policy_server": ["WebsocketPolicyServer"],
    "openpi.shared.array_typing": [
        *("Array", "ArrayLike", "Bool", "Float", "Int", "KeyArrayLike", "Params", "PyTree", "Real", "UInt8"),
        *("check_pytree_equality", "disable_typechecking", "typecheck"),
    ],
    "openpi.shared.download": ["maybe_download", "get_cache_dir"],
    "openpi.shared.image_tools": ["convert_to_uint8", "resize_with_pad"],
    "openpi.shared.nnx_utils": ["PathRegex", "module_jit", "state_map"],
    "openpi.shared.normalize": ["NormStats", "RunningStats", "load", "save"],
    "openpi.training.config": [
        "AssetsConfig",
        "DataConfig",
        "DataConfigFactory",
        "FakeDataConfig",
        "GroupFactory",
        "LeRobotAlohaDataConfig",
        "LeRobotDROIDDataConfig",
        "LeRobotLiberoDataConfig",
        "ModelTransformFactory",
        "RLDSDroidDataConfig",
        "SimpleDataConfig",
        "TrainConfig",
        "_CONFIGS",
        "_CONFIGS_DICT",
        "cli",
        "get_config",
    ],
    "openpi.training.checkpoints": [
        *("Checkpoints", "initialize_checkpoint_dir", "load_norm_stats", "restore_state", "save_state"),
    ],
    "openpi.training.data_loader": [
        *("DataLoader", "DataLoaderImpl", "Dataset", "FakeDataset", "IterableDataset", "IterableTransformedDataset"),
        *("RLDSDataLoader", "TorchDataLoader", "TransformedDataset", "create_data_loader", "create_rlds_data_loader"),
        *("create_rlds_dataset", "create_torch_data_loader", "create_torch_dataset", "transform_dataset"),
        "transform_iterable_dataset",
    ],
    "openpi.training.droid_rlds_dataset": ["DroidActionSpace", "RLDSDataset"],
    "openpi.training.misc.polaris_config": ["get_polaris_configs"],
    "openpi.training.misc.roboarena_config": ["get_roboarena_configs"],
    "openpi.training.optimizer": [
        "AdamW",
        "CosineDecaySchedule",
        "LRScheduleConfig",
        "OptimizerConfig",
        "RsqrtDecaySchedule",
        "SGD",
        "create_optimizer",
    ],
    "openpi.training.sharding": [
        *("BATCH_AXIS", "DATA_AXIS", "FSDP_AXIS", "activation_sharding_constraint", "fsdp_sharding", "make_mesh"),
        "set_mesh",
    ],
    "openpi.training.utils": ["TrainState", "array_tree_to_info", "tree_to_info"],
    "openpi.training.weight_loaders": [
        "CheckpointWeightLoader",
        "NoOpWeightLoader",
        "PaliGemmaWeightLoader",
        "WeightLoader",
    ],
    "openpi_client.action_chunk_broker": ["ActionChunkBroker"],
    "openpi_client.base_policy": ["BasePolicy"],
    "openpi_client.image_tools": ["convert_to_uint8", "resize_with_pad"],
    "openpi_client.msgpack_numpy": ["packb", "unpackb"],
    "openpi_client.websocket_client_policy": ["WebsocketClientPolicy"],
    "openpi_client.runtime.runtime": ["Runtime"],
}

# Loading these must bring in neither JAX nor PyTorch.
FRAMEWORK_FREE = [
    "openpi.checkpoints.checkpoint",
    "openpi.training.checkpoints",
    "openpi.training.data_loader",
    "openpi.training.data.published_loader",
    "openpi.training.misc.polaris_config",
    "openpi.shared.image_tools",
    "openpi.training.config",
    "openpi.training.recipes",
    "openpi.training.recipe_io",
    "openpi.training.freeze",
    "openpi.training.optimizer",
    "openpi.training.weight_loaders",
    "openpi.training.loop",
    "openpi.cli.training.train",
    "openpi.transforms",
    "openpi.models.observation",
    "openpi.models.pi0_config",
    "openpi.models.pi0_fast_config",
    "openpi.models.tokenizer",
    "openpi.policies.aloha_policy",
    "openpi.policies.contract",
    "openpi.policies.policy",
    "openpi.policies.policy_config",
    "openpi.serving.openpi_session",
    "openpi.shared.normalize",
    "openpi.data.lerobot.reader",
    "openpi.convert.engine",
    "openpi.convert.formats.droid_raw",
    "openpi_positronic.raw_episodes",
    "openpi_positronic.codecs.catalog",
    "openpi_positronic.conversion",
    "openpi_client",
]


@pytest.mark.parametrize(("module", "names"), PUBLIC.items(), ids=PUBLIC)
def test_documented_import_paths_exist(module, names):
    if "pytorch" in module:
        pytest.importorskip("torch")
    found = importlib.import_module(module)
    assert [name for name in names if not hasattr(found, name)] == []
    with pytest.raises(AttributeError, match="no_such_name"):
        found.no_such_name  # noqa: B018


def test_imports_point_downwards():
    root = paths.ROOT
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_configurations_transforms_and_protocols_load_no_framework():
    loaded = _loaded_after(f"import {', '.join(FRAMEWORK_FREE)}")
    assert [name for name in ("jax", "torch", "tensorflow", "optax", "orbax") if name in loaded] == []


# Whole folders of one framework; the configurations in `openpi.models` import it within their methods.
JAX_FOLDERS = ("openpi.models.", "openpi.training.backends.jax.")
PYTORCH_FOLDERS = ("openpi.models_pytorch.", "openpi.training.backends.pytorch.")
# And the files elsewhere.
JAX = {
    "openpi_demo.pointing",
    "openpi.policies.sampler_jax",
    "openpi.weights.on_device",
    "openpi.weights.orbax_io",
    # What programs of others annotate, compile and shard with.
    "openpi.shared.array_typing",
    "openpi.shared.nnx_utils",
    "openpi.training.sharding",
    "openpi.training.utils",
}
# Within functions that run with JAX only.
JAX_LAZILY = {
    "openpi.cli.debugging.infer",
    "openpi.training.data.batch_arrays",  # gives arrays of JAX, or tensors of PyTorch
    "openpi.shared.image_tools",  # for images that are on a device
    "openpi.training.optimizer",
}
PYTORCH = {"openpi.policies.graphs_pytorch", "openpi.policies.sampler_pytorch"}


def test_the_command_that_serves_is_imported_by_nobody():
    """What it does is in `openpi.cli.serving.server`."""
    root = paths.ROOT
    files = [file for folder in ("src", "packages", "examples", "scripts") for file in (root / folder).rglob("*.py")]
    texts = {
        file: re.findall(r"^ *(?:from|import) .*\bcli\.serving(?:\.| import .*\b)serve\b", file.read_text(), re.M)
        for file in files
    }
    assert {str(file): found for file, found in texts.items() if found} == {}


def test_the_key_of_servers_is_read_from_the_environment_in_one_place():
    root = paths.ROOT
    files = [file for folder in ("src", "packages", "examples", "scripts") for file in (root / folder).rglob("*.py")]
    found = [file.name for file in files if re.search(r"(environ\b|getenv).*\W(OPENPI_)?API_KEY", file.read_text())]
    assert found == ["connection.py"]


def test_jax_is_imported_where_the_architecture_says_and_nowhere_else():
    assert _importers({"jax", "optax", "orbax"}, outside=JAX_FOLDERS) == {True: JAX, False: JAX_LAZILY}


def test_pytorch_is_imported_where_the_architecture_says_and_nowhere_else():
    assert _importers({"torch"}, outside=PYTORCH_FOLDERS) == {
        True: PYTORCH,
        False: {"openpi.training.data.batch_arrays", "openpi_client.image_tools"},
    }


def _importers(packages: set[str], *, outside: tuple[str, ...]) -> dict[bool, set[str]]:
    """Modules that import one of the packages at their top (true), or within functions (false)."""
    root = paths.ROOT
    found = {True: set(), False: set()}
    folders = (root / "src", *root.glob("packages/openpi-*/src"))
    for source, file in [(folder, file) for folder in folders for file in folder.rglob("*.py")]:
        module = ".".join(file.relative_to(source).with_suffix("").parts)
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if not module.startswith(outside) and _imports(node) & packages:
                found[node in tree.body].add(module)
    return found


def _imports(node: ast.AST) -> set[str]:
    """Top-level packages that a statement imports."""
    match node:
        case ast.Import():
            return {alias.name.partition(".")[0] for alias in node.names}
        case ast.ImportFrom(level=0, module=str(module)):
            return {module.partition(".")[0]}
    return set()


def test_programs_beside_the_packages_import_names_that_there_are():
    """Benchmarks and examples, most of which no test runs as a whole."""
    root = paths.ROOT
    programs = [
        file for folder in ("benchmarks", "docs", "examples", "scripts") for file in (root / folder).rglob("*.py")
    ]
    assert len(programs) > 50
    missing = [
        f"{program.relative_to(root)}: {node.module}.{alias.name}"
        for program in programs
        for node in ast.walk(ast.parse(program.read_text()))
        if isinstance(node, ast.ImportFrom) and _imports(node) & OURS
        for alias in node.names
        if not _is_there(str(node.module), alias.name)
    ]
    assert missing == []


def _is_there(module: str, name: str) -> bool:
    found = importlib.import_module(module)
    return hasattr(found, name) or (hasattr(found, "__path__") and bool(importlib.util.find_spec(f"{module}.{name}")))


def test_help_answers_without_loading_anything_heavy():
    """What makes it quick, on any machine."""
    loaded = _loaded_after("from openpi.cli.main import main; main(['--help'])")
    assert [name for name in HEAVY if name in loaded] == []


def _loaded_after(code: str) -> set[str]:
    """Top-level packages in a fresh interpreter after `code`."""
    report = "import sys; print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", f"{textwrap.dedent(code)}\n{report}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())
