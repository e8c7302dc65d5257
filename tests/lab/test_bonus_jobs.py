"""How a configuration's density and bonus come to the agent."""

import pytest
import torch

from agents.bonus import CountBonus
from agents.distillation import RandomNetworkDistillation
from envs.api import UserError
from lab.configure import compose, plain
from lab.run import make_agent, make_env

CPU = torch.device("cpu")


def jobs_of(*words):
    cfg = plain(compose(["env=Catch", "num_envs=2", *words]))
    env = make_env(cfg, 2, CPU)
    return make_agent(cfg, env.spec, CPU)[1]


def test_a_density_works_for_the_bonus():
    bonus = jobs_of("agent=dqn", "density=cts", "density.levels=4", "agent.capacity=500")["bonus"]
    assert isinstance(bonus, CountBonus)
    assert bonus.density.levels == 4
    assert bonus.density.obs_shape == (1, 7, 7)


def test_atari_frames_are_counted_at_42x42():
    bonus = jobs_of("agent=a3c_plus", "env=Freeway")["bonus"]
    assert bonus.density.obs_shape == (1, 42, 42)


def test_without_a_density_dqn_has_no_bonus():
    assert jobs_of("agent=dqn", "agent.capacity=500") == {}


def test_bonuses_are_chosen_by_name():
    assert jobs_of("agent=a3c_plus", "bonus=none") == {}
    assert isinstance(jobs_of("agent=a3c_plus", "bonus=rnd")["bonus"], RandomNetworkDistillation)
    assert isinstance(jobs_of("agent=a3c_plus", "bonus=gain")["bonus"], CountBonus)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["agent=a3c_plus", "density=vae"], r"bound.*bonus\.allow_bound=true"),
        (["agent=a3c_plus", "density=random_projection"], "a RandomProjection is no density"),
        (["agent=a3c_plus", "density=ctz"], "there is no density=ctz; the nearest are density=cts"),
        (["agent=a3c_plus", "bonus=rndd"], "there is no bonus=rndd; the nearest are bonus=rnd"),
        (["agent=a3c_plus", "bonus=nope"], "there is no bonus=nope; the nearest are bonus=none"),
        (["agent=a3c_plus", "bonus=xyz"], "there is no bonus=xyz; there are bonus=gain, bonus=inverse"),
        (["agent=a3c_plus", "density.levels=1"], r"levels must lie in 2\.\.256"),
        (["agent=a3c_plus", "bonus.scale=1"], "bonus.scale"),
        (["agent=a3c_plus", "agent.bonus_scale=-1"], "agent.bonus_scale"),
        (["agent=a3c", "density=cts"], "nothing to choose with density="),
        (["agent=episodic_control", "bonus=rnd"], "nothing to choose with bonus="),
    ],
)
def test_wrong_words_are_refused_by_name(words, message):
    with pytest.raises(UserError, match=message):
        jobs_of(*words)


def test_a_bound_is_taken_where_it_is_asked_for():
    bonus = jobs_of("agent=a3c_plus", "density=vae", "bonus.allow_bound=true")["bonus"]
    assert not bonus.exact
    assert bonus(torch.zeros(2, 1, 10, 5, dtype=torch.uint8)).shape == (2,)
