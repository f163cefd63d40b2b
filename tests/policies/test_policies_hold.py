"""What a robot is told when the model wrote no action chunk."""

from types import SimpleNamespace

import numpy as np
import pytest

from openpi import transforms
from openpi.models.fast_codec import UndecodableActionsError
from openpi.models.model_config import ModelType
from openpi.policies import droid_policy, libero_policy, tabletop_policy, ur5_policy
from openpi.policies.hold import hold_transforms
from openpi.policies.policy import Policy
from openpi.shared.normalize import NormStats

STATE = np.array([0.3, -0.2, 0.5, 0.1, -0.4, 0.8])


def tabletop_data(*, delta: bool) -> SimpleNamespace:
    group = transforms.Group(inputs=(tabletop_policy.TabletopInputs(),), outputs=(tabletop_policy.TabletopOutputs(),))
    if delta:
        absolute = transforms.AbsoluteActions(transforms.make_bool_mask(5, -1))
        group = transforms.Group(inputs=group.inputs, outputs=(absolute, *group.outputs))
    stats = NormStats(mean=np.full(6, 0.5), std=np.full(6, 2.0), q01=None, q99=None)
    return SimpleNamespace(
        data_transforms=group, norm_stats={"state": stats, "actions": stats}, use_quantile_norm=False
    )


def normalised(state: np.ndarray) -> np.ndarray:
    return (state - 0.5) / (2.0 + 1e-6)


class Rambling:
    """A model that writes no actions."""

    action_horizon, action_dim, takes_noise = 4, 6, False

    def sample(self, inputs, noise, **kwargs):
        return np.zeros((1, 10), np.float32)


class Reader:
    """Tokens are never actions."""

    def __call__(self, data):
        raise UndecodableActionsError("the generated text has no 'Action: '")


def policy(*, hold: bool) -> Policy:
    return Policy(
        Rambling(),
        output_transforms=[Reader()],
        hold_transforms=hold_transforms(tabletop_data(delta=True), 4) if hold else None,
    )


@pytest.mark.parametrize("delta", [True, False])
def test_standing_still_is_the_measured_state_whether_or_not_actions_are_relative(delta):
    chain = transforms.compose(hold_transforms(tabletop_data(delta=delta), 4))
    actions = chain({"state": normalised(STATE)})["actions"]
    np.testing.assert_allclose(actions, np.tile(STATE, (4, 1)), atol=1e-6)


@pytest.mark.parametrize(
    ("robot", "mask", "state", "expected"),
    [
        # Relative poses, from which the old pi0 recipes subtract the state all the same.
        ("libero", None, np.arange(1.0, 9), [0] * 7),
        ("libero", transforms.make_bool_mask(6, -1), np.arange(1.0, 9), [0] * 7),
        # Positions, relative in training or not.
        ("ur5", None, np.arange(1.0, 8), range(1, 8)),
        ("ur5", transforms.make_bool_mask(6, -1), np.arange(1.0, 8), range(1, 8)),
    ],
)
def test_every_robot_stands_still_in_its_own_way(robot, mask, state, expected):
    inputs = {
        "libero": libero_policy.LiberoInputs(ModelType.PI0_FAST),
        "ur5": ur5_policy.UR5Inputs(ModelType.PI0_FAST),
    }[robot]
    outputs = () if mask is None else (transforms.AbsoluteActions(mask),)
    data = SimpleNamespace(
        data_transforms=transforms.Group(inputs=(inputs,), outputs=outputs), norm_stats=None, use_quantile_norm=True
    )
    actions = transforms.compose(hold_transforms(data, 2))({"state": state})["actions"]
    np.testing.assert_array_equal(actions, np.tile(np.array([*expected]), (2, 1)))


def test_an_answer_that_is_no_chunk_is_an_error_and_is_counted():
    strict = policy(hold=False)
    for count in (1, 2):
        with pytest.raises(UndecodableActionsError, match="no 'Action: '"):
            strict.infer({"state": normalised(STATE)})
        assert strict.num_undecodable == count


def test_or_the_robot_stands_still_and_the_answer_says_so(caplog):
    patient = policy(hold=True)
    answer = patient.infer({"state": normalised(STATE)})
    assert answer["held"] is True and patient.num_undecodable == 1
    np.testing.assert_allclose(answer["actions"], np.tile(STATE, (4, 1)), atol=1e-6)
    assert "no action chunk was written (1 so far)" in caplog.text


def test_a_robot_that_does_not_say_how_is_refused_when_the_policy_is_made():
    data = tabletop_data(delta=False)
    # Clients open or close a DROID gripper by a threshold: its measured position may drop what it holds.
    for inputs in ((), (droid_policy.DroidInputs(ModelType.PI0_FAST),)):
        data.data_transforms = transforms.Group(inputs=inputs)
        with pytest.raises(ValueError, match=r"does not say how it stands still.*follows_state"):
            hold_transforms(data, 4)


def test_output_transforms_whose_sum_is_unknown_are_refused():
    data = tabletop_data(delta=True)
    absolute = data.data_transforms.outputs[0]
    for outputs in ((absolute, absolute), (transforms.CompositeTransform([absolute]),)):
        data.data_transforms = transforms.Group(inputs=data.data_transforms.inputs, outputs=outputs)
        with pytest.raises(ValueError, match="flat list of output transforms"):
            hold_transforms(data, 4)
