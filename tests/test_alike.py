"""Programs alike: optima from bases of a few against solves one by one, whatever numbers differ."""

from dataclasses import replace

import numpy as np
import pytest
import strategies
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fluidopt as fo
from fluidopt.solvers import certify, solve_program
from fluidopt.solvers.alike import Alike, Optima, solved_with_basis
from fluidopt.solvers.certificate import Certifier, SolverOptions
from fluidopt.solvers.moved import MovedCertifier

# Given numbers that may all move, by symbol.
MOVING = ("lambda", "theta", "P", "D", "tau", "C", "b", "c_p", "c_d")


def moved(model, rng, count, names=MOVING):
    """Random numbers near the present ones; where these are 0 they stay."""
    present = model.numbers().values
    return {name: present[name] * rng.uniform(0.8, 1.25, (count, *np.shape(present[name]))) for name in names}


def alone(model, changes, at):
    """One entry by a solver of its own, or its error."""
    try:
        return fo.Solver(model).solve({name: array[at] for name, array in changes.items()})
    except fo.FluidoptError as error:
        return error


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(strategies.pair_models(), strategies.mode_models()), st.integers(0, 2**32))
def test_every_number_may_move_and_every_entry_is_certified(model, seed):
    rng = np.random.default_rng(seed)
    changes = moved(model, rng, 10, rng.choice(MOVING, 4, replace=False).tolist())
    many = fo.Solver(model).solve_each(changes)
    for at in range(10):
        single = alone(model, changes, at)
        if isinstance(single, fo.FluidoptError):
            assert type(many.failures[at]) is type(single)
            assert np.isnan(many.objective[at])
            continue
        assert many.objective[at] == pytest.approx(single.objective, rel=1e-7, abs=1e-9)
        assert certify(single.program, many.solution_values[at], many.solution_duals[at]).holds(1e-7)


def test_few_programs_are_solved_for_many_entries_also_where_coefficients_move():
    model, rng = fo.reference_model(), np.random.default_rng(3)
    changes = moved(model, rng, 600)
    solver = fo.Solver(model)
    many = solver.solve_many(changes)
    assert many.bases < 20
    assert many.failures == {}
    for at in range(0, 600, 60):
        assert many.objective[at] == pytest.approx(alone(model, changes, at).objective, rel=1e-9)
    assert solver.solve().objective == pytest.approx(model.solve().revenue_rate, rel=1e-12)  # numbers held stay


def test_entries_with_other_rows_and_columns_are_solved_and_have_no_vectors():
    model = fo.reference_model()
    theta = np.array([[0.1, 0.1], [0.0, 0.1], [0.2, 0.1]])
    changes = {"theta": theta, "lambda": np.full((3, 2), 0.1), "c_d": [0.2, 0.3, 0.4]}
    solver = fo.Solver(model)
    many = solver.solve_many(changes)
    for at in range(3):
        classes = [
            replace(each, abandonment_rate=rate, arrival_rate=0.1)
            for each, rate in zip(model.workload, theta[at].tolist(), strict=True)
        ]
        fresh = fo.FluidModel(classes, model.gpu_types, prices=fo.TokenPrices(prompt=0.1, output=changes["c_d"][at]))
        assert many.objective[at] == pytest.approx(fresh.solve("highs").revenue_rate, rel=1e-9)
    assert np.isnan(many.solution_values[1]).all()
    assert not np.isnan(many.solution_values[[0, 2]]).any()
    assert solver.solve().objective == pytest.approx(model.solve().revenue_rate, rel=1e-12)


def test_a_large_program_is_solved_entry_by_entry_and_gives_the_same():
    model = fo.reference_model()
    classes = [replace(model.workload[0], name=f"class {at}", arrival_rate=0.02) for at in range(60)]
    large = fo.FluidModel(classes, model.gpu_types, prices=model.scenario.prices)
    prices = np.array([0.1, 0.3])
    found = fo.Solver(large).solve_many({"c_d": prices})
    assert found.bases == 2
    np.testing.assert_allclose(
        found.objective, [alone(large, {"c_d": prices}, at).objective for at in (0, 1)], rtol=1e-9
    )


def test_what_has_no_certified_answer_is_raised_or_noted():
    solver = fo.Solver(fo.reference_model())
    changes = {"P": [[1e-200, 3000.0], [300.0, 3000.0]]}
    with pytest.raises(fo.SolverFailure):
        solver.solve_many(changes)
    found = solver.solve_each(changes)
    assert list(found.failures) == [0]
    assert np.isnan(found.objective[0])
    assert found.objective[1] == pytest.approx(fo.reference_model().solve().revenue_rate, rel=1e-9)


def test_moved_rows_multiply_and_certify_as_matrices_of_their_own():
    rng = np.random.default_rng(8)
    program = fo.reference_model().program()
    shared, moving = program.matrix.toarray(), np.array([1, 4])
    rows = shared[moving] * rng.uniform(0.5, 2.0, (3, 2, program.shape[1]))
    values, duals = rng.uniform(0, 1, (3, program.shape[1])), rng.normal(size=(3, program.shape[0]))
    sides = (np.tile(each, (3, 1)) for each in (program.row_lower, program.row_upper, program.objective))
    lower, upper, cost = sides
    together = MovedCertifier(program, shared, moving, rows).figures(lower, upper, cost, values, duals)
    programs = Alike(program, moving, rows, lower, upper, cost)
    for at in range(3):
        own = programs.at(at)
        single = Certifier(own).figures(lower[at], upper[at], cost[at], values[at], duals[at])
        np.testing.assert_allclose([each[at] for each in together], single, rtol=1e-12)
        expected = shared.copy()
        expected[moving] = rows[at]
        np.testing.assert_array_equal(own.matrix.toarray(), expected)


def test_a_basis_that_is_singular_elsewhere_is_not_taken_there():
    program = fo.reference_model().program()
    _, basis = solved_with_basis(program, SolverOptions(), 1e-7)
    tight = int(basis.tight[0])
    row = program.matrix.toarray()[[tight]]
    sides = (np.tile(each, (2, 1)) for each in (program.row_lower, program.row_upper, program.objective))
    gone = Alike(program, np.array([tight]), np.stack([row, np.zeros_like(row)]), *sides)
    optima = Optima(gone)
    assert optima.offer(basis, np.array([1])) == 0
    assert optima.offer(basis, np.array([0])) == 1
    assert optima.objective[0] == pytest.approx(solve_program(program).certificate.objective, rel=1e-12)
