"""Rows and objectives as text: what is read, what is refused and how, and the way back to text."""

import contextlib
import math
import random
import sys
import time

import pytest
import sympy
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import fluidopt as fo
from fluidopt.expressions import (
    MOST_DEPTH,
    MOST_TOKENS,
    parse_condition,
    parse_expression,
    parse_relation,
    write_condition,
    write_expression,
    write_relation,
)
from fluidopt.formulation import Symbols
from fluidopt.reference import reference_model

SYMBOLS = reference_model().symbols
S = SYMBOLS
# Labels with everything that could confuse a reader of text.
LABELS = ("code", 'say "hi"', "it's", "lambda[i] <= 2", "back\\slash", "two\nlines", "éü €", "x", "i", "")
AWKWARD = Symbols({"class": LABELS, "mode": ("mixed", "solo"), "gpu": ("A", "B")})


# ---- what is read -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "relation"),
    [
        ("q_p[i] <= 2*lambda[i]", S.q_p[S.i] <= 2 * S.lambda_[S.i]),
        ("q_p[i] <= 2*lambda_[i]", S.q_p[S.i] <= 2 * S.lambda_[S.i]),
        ('x["decode-heavy", k] >= 0.1', S.x["decode-heavy", S.k] >= 0.1),
        ("x['decode-heavy', 'mixed'] >= 1/10", S.x["decode-heavy", "mixed"] >= sympy.Rational(1, 10)),
        ("sum(x[i, k], k) == 0.5*b[k]", sympy.Eq(S.sum(S.x[S.i, S.k], over=S.k), 0.5 * S.b[S.k])),
        ("sum(sum(x[i,k], over=k), i) <= 1", S.sum(S.sum(S.x[S.i, S.k], over=S.k), over=S.i) <= 1),
        ("\n  q_d[i]\n\t<= 1e-3 ", S.q_d[S.i] <= 0.001),
        (
            "exp(-theta[i])*q_p[i] <= max(c_p, 2, c_d)",
            sympy.exp(-S.theta[S.i]) * S.q_p[S.i] <= sympy.Max(S.c_p, 2, S.c_d),
        ),
        ("-(phi[k] - abs(1 - tau[k])) <= sqrt(2)", -S.phi[S.k] + sympy.Abs(1 - S.tau[S.k]) <= sympy.sqrt(2)),
    ],
)
def test_a_row_is_read_as_the_symbols_write_it(text, relation):
    assert parse_relation(text, SYMBOLS) == relation


@pytest.mark.parametrize(
    "choice", ["max(log(6), log(2) + log(3))", "min(log(6), log(2) + log(3))", "abs(log(6) - log(2) - log(3))"]
)
def test_constants_that_only_floating_point_can_compare_are_read(choice):
    """They are the same number or 0, which no algebra here shows."""
    relation = parse_relation(f"exp({choice})*q_p[i] <= 1", SYMBOLS)
    exact = 1 if choice.startswith("abs") else 6
    assert float(relation.lhs / S.q_p[S.i]) == pytest.approx(exact)


def test_a_row_read_from_text_can_be_added_to_a_model(reference):
    row = parse_relation("sum(x[i, 'mixed'], i) <= 0.1", reference.symbols)
    plan = reference.subject_to(row, name="few_prefills").solve()
    assert plan.prefill[:, 0].sum() == pytest.approx(0.1, rel=1e-6)


def test_a_condition_selects_by_parameters():
    assert parse_condition("theta[i] > 0", SYMBOLS) == (S.theta[S.i] > 0)
    assert parse_condition("C[k] != 0", SYMBOLS) == sympy.Ne(S.C[S.k], 0)


numbers = st.one_of(
    st.integers(0, 99).map(str),
    st.floats(1e-6, 1e6).map(repr),
    st.sampled_from(["1e-3", ".5", "2.", "0", "1/3"]),
)


def arithmetic(inner):
    return st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", " - ", " + ", "* "]), inner).map("".join),
        st.tuples(inner, st.sampled_from(["/", " / "]), st.integers(1, 9).map(str)).map("".join),
        st.tuples(inner, st.just("**"), st.integers(0, 3).map(str)).map("".join),
        inner.map(lambda text: f"-{text}"),
        inner.map(lambda text: f"({text})"),
        inner.map(lambda text: f"abs({text})"),
        st.tuples(inner, inner).map(lambda pair: f"max({pair[0]}, {pair[1]})"),
    )


@settings(max_examples=300)
@given(st.recursive(numbers, arithmetic, max_leaves=12))
@example("-2**2")
@example("2**3**2")
@example("8/2/2*3")
@example("1 - 2 - 3")
@example("2**-1")
@example("-2*-3 - -4")
def test_precedence_is_that_of_python(text):
    expected = eval(text)
    scale = eval(text.replace("-", "+").replace("e+", "e-"))  # the sum of the absolute terms
    assert float(parse_expression(text, SYMBOLS)) == pytest.approx(expected, rel=1e-9, abs=1e-9 * max(1.0, abs(scale)))


# ---- the way back -----------------------------------------------------------------------------------------------


def members(symbols, labels):
    i = st.one_of(st.just(symbols.i), st.sampled_from(labels["class"]))
    k = st.one_of(st.just(symbols.k), st.sampled_from(labels["mode"]))
    pairs = st.tuples(st.sampled_from([symbols.x, symbols.y, symbols.mu_d]), i, k).map(lambda each: each[0][each[1:]])
    singles = st.tuples(st.sampled_from([symbols.q_p, symbols.lambda_, symbols.P]), i).map(
        lambda each: each[0][each[1]]
    )
    return st.one_of(pairs, singles, st.sampled_from([symbols.c_p, symbols.c_d]))


def constants():
    return st.one_of(
        st.integers(-50, 50).map(sympy.Integer),
        st.fractions(-5, 5, max_denominator=50).map(lambda value: sympy.Rational(value.numerator, value.denominator)),
        st.floats(-1e6, 1e6, allow_subnormal=False).map(sympy.Float),
        st.sampled_from([sympy.sqrt(2), sympy.exp(1), sympy.exp(-2), sympy.log(3)]),
    )


def combined(symbols):
    exponents = st.sampled_from(
        [2, 3, -1, -2, sympy.Rational(1, 2), sympy.Rational(-1, 2), sympy.Rational(2, 3), 0.5, -1.5]
    )
    functions = st.sampled_from([sympy.exp, lambda part: sympy.log(part + 1), sympy.sqrt])

    def extend(inner):
        return st.one_of(
            st.tuples(inner, inner).map(lambda pair: pair[0] + pair[1]),
            st.tuples(inner, inner).map(lambda pair: pair[0] - pair[1]),
            st.tuples(inner, inner).map(lambda pair: pair[0] * pair[1]),
            st.tuples(inner, exponents).map(lambda pair: pair[0] ** pair[1] if pair[0] != 0 else pair[0]),
            st.tuples(inner, functions).map(lambda pair: pair[1](pair[0])),
            st.tuples(inner, inner).map(
                lambda pair: sympy.Max(*pair) if all(map(is_real_and_small, pair)) else pair[1]
            ),
            inner.map(lambda part: symbols.sum(part, over=symbols.k) if symbols.k in part.free_symbols else part),
            inner.map(lambda part: symbols.sum(part, over=symbols.i) if symbols.i in part.free_symbols else part),
        )

    return extend


def is_real_and_small(expression):
    bad = (sympy.I, sympy.nan, sympy.zoo, sympy.oo, -sympy.oo)
    if expression.has(*bad) or expression.has(sympy.re, sympy.im, sympy.conjugate, sympy.Piecewise):
        return False
    if any(number != 0 and not 1e-200 < abs(sympy.N(number)) < 1e200 for number in expression.atoms(sympy.Number)):
        return False
    constants = [part for part in sympy.preorder_traversal(expression) if part.is_number and not part.is_Number]
    return all(sympy.N(part).is_real for part in constants)


@st.composite
def expressions(draw, symbols=AWKWARD):
    labels = {"class": LABELS, "mode": ("mixed", "solo")}
    leaves = st.one_of(members(symbols, labels), members(symbols, labels), constants())
    expression = draw(st.recursive(leaves, combined(symbols), max_leaves=8))
    return sympy.sympify(expression)


@settings(max_examples=300)
@given(expressions())
def test_an_expression_written_as_text_is_read_back_as_itself(expression):
    assume(is_real_and_small(expression))
    text = write_expression(expression, AWKWARD)
    assert parse_expression(text, AWKWARD) == expression
    assert write_expression(parse_expression(text, AWKWARD), AWKWARD) == text


@settings(max_examples=100)
@given(st.sampled_from(LABELS), st.sampled_from([sympy.Le, sympy.Ge, sympy.Eq]), st.floats(0.001, 1000))
def test_a_row_written_as_text_is_read_back_as_itself(label, relation, bound):
    row = relation(2 * AWKWARD.q_p[label] - AWKWARD.x[label, AWKWARD.k] / 3, bound * AWKWARD.lambda_[AWKWARD.i])
    assert parse_relation(write_relation(row, AWKWARD), AWKWARD) == row


def test_conditions_are_written_and_read_back():
    for condition in (S.theta[S.i] > 0, S.P[S.i] <= 2 * S.D[S.i], sympy.Ne(S.C[S.k], 0), sympy.Eq(S.b[S.k], 3)):
        assert parse_condition(write_condition(condition, SYMBOLS), SYMBOLS) == condition


def test_text_is_short_and_in_the_models_own_words():
    row = S.sum(S.mu_d["decode-heavy", S.k] * S.y["decode-heavy", S.k], over=S.k) >= S.lambda_["decode-heavy"] / 2
    text = 'sum(mu_d["decode-heavy", k]*y["decode-heavy", k], k) >= lambda["decode-heavy"]/2'
    assert write_relation(row, SYMBOLS) == text


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        (sympy.Symbol("z") + 1, "z has no text form"),
        (sympy.sin(S.q_p[S.i]), "has no text form: allowed are numbers"),
        (S.q_p[S.i] ** S.theta[S.i], "an exponent is a number"),
        (sympy.IndexedBase("member")[S.g, S.k], "not a symbol that text can use; they are x, y"),
        (sympy.Sum(S.q_p[S.i], (S.i, 0, 3)), "does not run over a whole set"),
        (sympy.oo * S.q_p[S.i], "not a number that a text form can hold"),
        (sympy.Mul(2, S.c_p + S.c_d, evaluate=False), "has no text form: .* would be read as 2"),
        (sympy.Float("0.1", 40) * S.c_p, "has no text form"),
    ],
)
def test_what_text_cannot_say_is_not_written(expression, message):
    with pytest.raises(fo.InvalidInput, match=message):
        write_expression(expression, SYMBOLS)


def test_only_rows_and_single_comparisons_are_written():
    with pytest.raises(fo.InvalidInput, match="strict or an inequation"):
        write_relation(S.q_p[S.i] < 1, SYMBOLS)
    with pytest.raises(fo.InvalidInput, match="expected a relation"):
        write_relation(S.q_p[S.i], SYMBOLS)
    with pytest.raises(fo.InvalidInput, match="a single comparison such as"):
        write_condition(sympy.And(S.theta[S.i] > 0, S.P[S.i] > 1), SYMBOLS)


# ---- what is refused --------------------------------------------------------------------------------------------

REFUSED = [
    ("", "'' is empty; write for instance"),
    ("  \n", "is empty"),
    ("1 <= 2", "holds no variable"),
    ("theta[i] <= 2", "holds no variable"),
    ("x[i,k] - x[i,k] <= 3", "holds no variable"),
    ("x[i,k]", "found a member alone; a row is two expressions"),
    ("0 <= x[i,k] <= 1", "column 16: found 2 comparisons"),
    ("x[i,k] < 1", "column 10: found one of <, >, !="),
    ("x[i,k] != 1", "found one of <, >, !="),
    ("x[i,k] = 1", "column 8: found '='; an equation is written with =="),
    ("(x[i,k] <= 1) <= 2", "found a comparison; allowed are"),
    ("x <= 1", r"column 1: found x without subscripts; write x\[i, k\]"),
    ("lambda <= q_p[i]", r"found lambda without subscripts; write lambda\[i\]"),
    ("i <= q_p[i]", "found the index i as a number"),
    ("exp <= q_p[i]", "found 'exp' without arguments"),
    ("lamda[i] <= 1", "column 1: found the name 'lamda'; did you mean 'lambda'"),
    ("LAMBDA[i] <= q_p[i]", "found the name 'LAMBDA'"),
    ("x[k,i] <= 1", r"x\[k\]: there is no class of that name"),
    ("x['nobody', k] <= 1", r"x\['nobody'\]: there is no class of that name"),
    ("x[1, k] <= 1", "column 3: found a number as a subscript; write i, k, g or a quoted label"),
    ("x[i] <= 1", "x takes 2 subscript"),
    ("2[i] <= x[i,k]", "found subscripts of a number"),
    ("x[i,k][i] <= 1", "found subscripts of a member"),
    ("exp[i] <= x[i,k]", "found subscripts of 'exp'"),
    ("'code' <= x[i,k]", "found the label 'code'"),
    (r"q_p['\q'] <= 1", "found the label .*escapes in it are"),
    ("sum(x[i,k]) <= 1", "found a sum without exactly one expression and one index"),
    ("sum(x[i,k], k, i) <= 1", "found a sum without exactly one"),
    ("sum(x[i,k], over=2) <= 1", "found a sum over a number"),
    ("sum(sum(x[i,k],k),k) <= 1", "found a second sum over k"),
    ("exp(x[i,k], 2) <= 1", "found 2 arguments of exp; it takes one argument"),
    ("max(x[i,k]) <= 1", "found 1 arguments of max; it takes 2 to 20"),
    ("max(" + "1," * 20 + "x[i,k]) <= 1", "found 21 arguments of max"),
    ("max(1, over=x[i,k]) <= 1", "found 'over' given by name"),
    ("x[i,k](2) <= 1", "found a call of a member"),
    ("i(2) <= x[i,k]", "found a call of 'i'"),
    ("abs(exp(x[i,k])) <= 1", "found abs of something it is not defined for here"),
    ("x[i,k]**y[i,k] <= 1", r"found the exponent y\[i, k\]; an exponent is a number"),
    ("x[i,k]**101 <= 1", "found the exponent '101'; it is at most 100"),
    ("x[i,k] <= 9**9**9", "found the exponent '387420489'"),
    ("x[i,k] <= 10**100**100", "found the exponent"),
    ("(((9**99)**99)**99)*x[i,k] <= 1", "has no finite real value"),
    ("(1/3)**(1/2)*(123456789012345678901/7)**(1/2) <= x[i,k]", "found the root of a number of more than 64 bits"),
    ("exp(1000)*x[i,k] <= 1", r"'exp\(1000\)' has no finite real value"),
    ("exp(exp(exp(9))) <= x[i,k]", "has no finite real value"),
    ("log(0) <= x[i,k]", "has no finite real value"),
    ("sqrt(-1) <= x[i,k]", "has no finite real value"),
    ("1/0 <= x[i,k]", "has no finite real value"),
    ("x[i,k]/(y[i,k] - y[i,k]) <= 1", "has no finite real value"),
    ("sqrt(-abs(x[i,k])) <= 1", "found a division by 0 or a root of a negative number; every value must be real"),
    ("max(sqrt(-abs(x[i,k]) - 1), 2) <= 1", "found max of something without an order; every value must be real"),
    ("(9**99/7**99)**4*x[i,k] <= 1", "found a number too large, too small or too long"),
    ("1/sum(0*x[i,k], k) <= q_p[i]", r"'0\*\*-1' has no finite real value"),
    ("x[i,k] <= 1e200*1e200", "found a number too large, too small or too long"),
    ("x[i,k] <= 1e999", "column 11: found '1e999'; a number lies between"),
    ("x[i,k] <= 1e-200*1e-200", "found a number too large, too small or too long"),
    ("x[i,k] <= 1e-310", "found '1e-310'; a number lies between"),
    ("x[i,k] <= 1e-999", "found '1e-999'; a number lies between"),
    ("x[i,k] <= " + "9" * 400, "a number lies between"),
    ("x[i,k] // 2 <= 1", "found the operator //"),
    ("x[i,k] % 2 <= 1", "column 8: found '%'; allowed are numbers, names"),
    ("x[i,k] @ 2 <= 1", "found '@'"),
    ("x[i,k] <= 5j", "found '5j'; a number is followed by an operator"),
    ("2x[i,k] <= 1", "found '2x'"),
    ("0x10 <= x[i,k]", "found '0x'"),
    ("1_000 <= x[i,k]", "found '1_'"),
    ("01 <= x[i,k]", "this is not a complete expression"),
    ("x[i,k] <= True", "found the name 'True'"),
    ("x[i,k] and 1 <= 1", "found the name 'and'"),
    ("x[i,k] <= 1)", "column 12: found '\\)' that closes nothing"),
    ("q_p[i]) <= (q_d[i]", "closes nothing"),
    ("(x[i,k] <= 1", "this is not a complete expression"),
    ("(x[i,k]] <= 1", "this is not a complete expression"),
    ("x[i,k] <= ", "this is not a complete expression"),
    ("x[i,k], 1 <= 1", "found a list of expressions"),
    ("[x[i,k]] <= 1", "found a list in square brackets"),
    ("x[*i] <= 1", "found a starred argument as a subscript"),
    ("max(*x) <= 1", "found 1 arguments of max"),
]
MALICIOUS = [
    "__import__('os').system('true') <= x[i,k]",
    "x.__class__.__bases__ <= 1",
    "x[i,k].func <= 1",
    "().__class__ <= x[i,k]",
    "(lambda: 1)() <= x[i,k]",
    "lambda q_p: q_p <= 1",
    "[x for x in range(9)] <= 1",
    "sum(x[i,k] for k in g) <= 1",
    "{x} <= 1",
    "f'{x}' <= 1",
    "b'x' <= 1",
    "x[f'{i}', k] <= 1",
    "x['a' 'b', k] <= 1",
    "(x := 1) <= 2",
    "exec('1') <= x[i,k]",
    "eval('1') <= x[i,k]",
    "open('/etc/passwd') <= x[i,k]",
    "x[i,k] <= 1; import os",
    "x[i,k] <= 1 # comment",
    "x[i,k] <= 1 \\\n",
    "x[i,k] \x00 <= 1",
    "х[i,k] <= 1",  # a Cyrillic letter
    "ｘ[i,k] <= 1",  # a full-width letter, which Python would take for x
    "𝑥[i,k] <= 1",
    "x[i,k] <= １",
    "x[i,k] ≤ 1",
    "x[i,k] − 1 <= 1",
    "x[i,k]\u00a0<= 1",
    "x[i,k] <= 1 if 1 else 2",
    "await x <= 1",
    "yield <= 1",
    "not x[i,k] <= 1",
    "x[i:k] <= 1",
    "x[...] <= 1",
    "'''x''' <= 1",
    "*x <= 1",
    "_LAMBDA <= 1",
    "x[i,k] <= {{7*7}}",
]


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_what_is_not_a_row_is_refused_with_its_place_and_reason(text, message):
    with pytest.raises(fo.InvalidInput, match=message):
        parse_relation(text, SYMBOLS)


@pytest.mark.parametrize("trouble", [RecursionError, MemoryError, ValueError])
def test_text_that_defeats_pythons_parser_is_refused(monkeypatch, trouble):
    def parse(*_, **__):
        raise trouble

    monkeypatch.setattr("fluidopt.expressions.reading.ast.parse", parse)
    with pytest.raises(fo.InvalidInput, match="this is too deeply nested to be read"):
        parse_relation("x[i,k] <= 1", SYMBOLS)


@pytest.mark.parametrize("text", MALICIOUS)
def test_nothing_but_arithmetic_in_the_models_symbols_is_read(text):
    with pytest.raises(fo.InvalidInput):
        parse_relation(text, SYMBOLS)


def test_an_expression_is_not_a_relation_and_a_condition_has_parameters_only():
    with pytest.raises(fo.InvalidInput, match="found a comparison; allowed are numbers"):
        parse_expression("x[i,k] <= 1", SYMBOLS)
    with pytest.raises(fo.InvalidInput, match="is a condition on parameters, but q_p is a variable"):
        parse_condition("q_p[i] > 1", SYMBOLS)
    with pytest.raises(fo.InvalidInput, match="holds no parameter, so it selects nothing"):
        parse_condition("1 < 2", SYMBOLS)
    for value in (None, 3, b"x[i,k] <= 1"):
        with pytest.raises(fo.InvalidInput, match="expected text such as"):
            parse_relation(value, SYMBOLS)


def test_a_long_text_is_shown_around_what_is_wrong():
    text = "q_p[i] + " * 100 + "oops + " + "q_d[i] + " * 100 + "1 <= 2"
    with pytest.raises(fo.InvalidInput, match="column 901: found the name 'oops'") as caught:
        parse_relation(text, SYMBOLS)
    assert "oops" in str(caught.value).split("column")[0]
    assert len(str(caught.value).split("column")[0]) < 200


DEEP = {
    "brackets": "(" * 10_000,
    "balanced brackets": "(" * 5_000 + "x[i,k]" + ")" * 5_000 + " <= 1",
    "brackets at the limit": "(" * (MOST_DEPTH + 1) + "x[i,k]" + ")" * (MOST_DEPTH + 1) + " <= 1",
    "minus signs": "-" * 10_000 + "x[i,k] <= 1",
    "some minus signs": "-" * (MOST_TOKENS - 10) + "x[i,k] <= 1",
    "powers": "2**" * 600 + "1 <= x[i,k]",
    "inverse powers": "2**-" * 400 + "1 <= x[i,k]",
    "long sum": "x[i,k] + " * 5_000 + "1 <= 1",
    "long text": " " * 1_000_000,
    "long label": "x['" + "a" * 15_000 + "', k] <= 1",
    "nested calls": "exp(" * 500 + "x[i,k]" + ")" * 500 + " <= 1",
    "powers of powers": "(" * 30 + "x[i,k]" + "*2)**100" * 30 + " <= 1",
    "sums of powers": "(" * 30 + "x[i,k]" + "+1)**100" * 30 + " <= 1",
    "roots of roots": "(" * 19 + "x[i,k]" + "*(1/3))**(1/2)" * 19 + " <= 1",
    "long product": "*".join(f"(x[i,k] + {each})" for each in range(150)) + " <= 1",
    "many maxima": "max(" + ", ".join(f"min(q_p[i] + {each}, {each}*q_d[i])" for each in range(20)) + ") <= 1",
    "many roots": "(" + "+".join(f"{each}**(1/{2 + each % 7})" for each in range(2, 90)) + ")**99*q_p[i] <= 1",
}


@pytest.mark.parametrize("text", DEEP.values(), ids=DEEP.keys())
def test_deep_and_long_text_neither_crashes_nor_hangs(text):
    start = time.perf_counter()
    with contextlib.suppress(fo.InvalidInput):
        assert parse_relation(text, SYMBOLS).free_symbols
    assert time.perf_counter() - start < 5


def test_a_long_sum_is_read_also_from_a_deep_call():
    text = "q_p[i] + " * 250 + "1 <= 3"

    def at(depth):
        return at(depth - 1) if depth else parse_relation(text, SYMBOLS)

    assert at(sys.getrecursionlimit() // 4).lhs == 250 * S.q_p[S.i] + 1


@settings(max_examples=300)
@given(st.text(max_size=60))
def test_random_text_is_read_or_refused(text):
    for read in (parse_relation, parse_expression, parse_condition):
        with contextlib.suppress(fo.InvalidInput):
            read(text, SYMBOLS)


@settings(max_examples=200)
@given(st.binary(max_size=80).map(lambda data: data.decode("latin-1")))
def test_random_bytes_are_read_or_refused(text):
    with contextlib.suppress(fo.InvalidInput):
        parse_relation(f"q_p[i] {text} <= 1", SYMBOLS)


PIECES = [
    *("x[i,k]", "q_p[i]", "q_d['decode-heavy']", "lambda[i]", "theta[i]", "c_p", "1", "2", "0", "0.5", "1e-3", "9**9"),
    *("(", ")", "+", "-", "*", "/", "**", "<=", ">=", "==", "<", ",", "[", "]", "=", " ", '"', "'a'", "\n", "\\"),
    *(
        "sum(",
        "max(",
        "min(",
        "exp(",
        "log(",
        "sqrt(",
        "abs(",
        ",k)",
        ",i)",
        ", over=k)",
        "i",
        "k",
        "lambda",
        "for",
        "é",
    ),
]


def test_random_pieces_of_rows_are_read_and_written_back_or_refused():
    chosen, accepted = random.Random(7), 0
    for _ in range(20_000):
        text = "".join(chosen.choice(PIECES) for _ in range(chosen.randint(1, 14)))
        try:
            expression = parse_expression(text, SYMBOLS)
        except fo.InvalidInput:
            continue
        assert parse_expression(write_expression(expression, SYMBOLS), SYMBOLS) == expression
        accepted += 1
    assert accepted > 100


def test_numbers_keep_every_digit():
    for value in (0.1, 1 / 3, math.pi, 1e22, 5e-300, 123456789.123456789):
        assert float(parse_expression(repr(value), SYMBOLS)) == value
        assert float(parse_expression(write_expression(sympy.Float(value), SYMBOLS), SYMBOLS)) == value
