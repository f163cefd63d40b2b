"""What recipe files may name of this package; see `openpi.training.recipe.table`."""

from openpi.training.recipe.table import Entry, entries
from openpi_positronic import policy, recipes
from openpi_positronic.codecs import action, observation, timing

TYPES: tuple[Entry, ...] = (
    *entries("data", "openpi.training.recipes.positronic", recipes.LeRobotPositronicDataConfig),
    *entries("robot", "openpi.policies.positronic_policy", policy.PositronicInputs, policy.PositronicOutputs),
    *entries(
        "codec",
        "openpi.codecs.observation",
        observation.Vector,
        observation.Camera,
        observation.ObservationCodec,
        observation.Rename,
    ),
    *entries(
        "codec",
        "openpi.codecs.action",
        action.CartesianPose,
        action.JointPositions,
        action.JointDelta,
        action.BinariseGrip,
    ),
    *entries("codec", "openpi.codecs.timing", timing.Timing),
)
