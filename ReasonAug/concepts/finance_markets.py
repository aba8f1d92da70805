"""Finance families about risk, capital and markets; each answer is found twice."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from random import Random

from pipeline.config.loading import read_yaml
from ReasonAug.problem import FINANCE, Concept, Values, agree

TEXTS = read_yaml(Path(__file__).with_suffix(".yaml"))


def _capm(rng: Random) -> Values:
    free, market = rng.randint(5, 40) / 10, rng.randint(60, 120) / 10
    beta = rng.choice((0.4, 0.6, 0.8, 0.9, 1.1, 1.2, 1.4, 1.5, 1.7))
    expected = free + beta * (market - free)
    agree((1 - beta) * free + beta * market, expected)  # a portfolio with the same market risk
    return {
        "free": free, "market": market, "beta": beta, "premium": market - free,
        "expected": expected,
    }  # fmt: skip


CAPM = Concept.with_texts(
    TEXTS,
    name="Capital Asset Pricing Model",
    domain=FINANCE,
    draw=_capm,
    verified_by="return of the market-and-cash portfolio with the same exposure",
)


def _wacc(rng: Random) -> Values:
    equity, debt = rng.randint(10, 90), rng.randint(10, 90)
    cost_e, cost_d = rng.randint(70, 140) / 10, rng.randint(20, 65) / 10
    tax = rng.choice((19, 21, 25, 28, 30))
    total = equity + debt
    average = equity / total * cost_e + debt / total * cost_d * (1 - tax / 100)
    exact = Fraction(equity * round(cost_e * 10), 10)  # money paid per year, exactly
    exact += Fraction(debt * round(cost_d * 10) * (100 - tax), 1000)
    agree(float(exact / total), average)
    return {
        "equity": equity, "debt": debt, "cost_e": cost_e, "cost_d": cost_d, "tax": tax,
        "total": total, "net": cost_d * (1 - tax / 100), "average": average,
    }  # fmt: skip


WACC = Concept.with_texts(
    TEXTS,
    name="Weighted Average Cost of Capital",
    domain=FINANCE,
    draw=_wacc,
    verified_by="exact yearly payments to owners and lenders over total capital",
)


def _break_even(rng: Random) -> Values:
    fixed = rng.randrange(2000, 60000, 500)
    variable = rng.randint(2, 30)
    price = variable + rng.randint(2, 25)
    units = math.ceil(fixed / (price - variable))
    count = max(0, units - 5)  # second method: raise the quantity until the loss has gone
    while count * price < fixed + count * variable:
        count += 1
    agree(count, units)
    return {
        "fixed": fixed, "variable": variable, "price": price, "units": units,
        "margin": price - variable, "revenue": units * price,
    }  # fmt: skip


BREAK_EVEN = Concept.with_texts(
    TEXTS,
    name="Break-Even Point",
    domain=FINANCE,
    draw=_break_even,
    held_out=True,
    verified_by="raising the quantity until revenue covers cost",
)


def _parity(rng: Random) -> Values:
    strike, years = rng.randrange(40, 160, 5), rng.choice((0.5, 1, 1.5, 2))
    spot, rate = strike + rng.randint(-15, 15), rng.randint(1, 7)
    discounted = strike * math.exp(-rate / 100 * years)
    put = rng.randint(10, 90) / 10 + max(0.0, discounted - spot)
    call = put + spot - discounted
    for end in (0.5 * strike, strike, 1.8 * strike):  # both portfolios pay the same in every state
        agree(max(end - strike, 0.0) + strike, max(strike - end, 0.0) + end)
    agree(call + discounted, round(put, 10) + spot)
    return {
        "strike": strike, "years": years, "spot": spot, "rate": rate, "discounted": discounted,
        "put": put, "call": call,
    }  # fmt: skip


PUT_CALL_PARITY = Concept.with_texts(
    TEXTS,
    name="Put-Call Parity",
    domain=FINANCE,
    draw=_parity,
    held_out=True,
    verified_by="equal payoffs of the two portfolios in every final state, equal cost today",
)


def _sharpe(rng: Random) -> Values:
    free = rng.randint(1, 3)
    returns = [rng.randint(-12, 28) for _ in range(rng.randint(4, 6))]
    returns[0] += 1 if len(set(returns)) == 1 else 0
    n = len(returns)
    mean = sum(returns) / n
    deviation = math.sqrt(sum((r - mean) ** 2 for r in returns) / (n - 1))
    ratio = (mean - free) / deviation
    pairs = sum((a - b) ** 2 for a in returns for b in returns) / (2 * n * (n - 1))
    agree((sum(returns) - n * free) / n / math.sqrt(pairs), ratio)
    return {
        "free": free, "returns": ", ".join(map(str, returns)), "mean": mean,
        "deviation": deviation, "ratio": ratio, "excess": mean - free,
    }  # fmt: skip


SHARPE = Concept.with_texts(
    TEXTS,
    name="Sharpe Ratio",
    domain=FINANCE,
    draw=_sharpe,
    verified_by="variance from all pairwise differences",
)


def _fisher(rng: Random) -> Values:
    nominal, inflation = rng.randint(20, 120) / 10, rng.randint(10, 90) / 10
    real = (1 + nominal / 100) / (1 + inflation / 100) - 1
    baskets = 1000 * (1 + nominal / 100) / (10 * (1 + inflation / 100))  # of 10 each at first
    agree(baskets / 100, 1 + real)
    return {
        "nominal": nominal, "inflation": inflation, "real": 100 * real,
        "rough": nominal - inflation,
    }  # fmt: skip


FISHER = Concept.with_texts(
    TEXTS,
    name="Fisher Equation (Real Interest Rate)",
    domain=FINANCE,
    draw=_fisher,
    verified_by="number of baskets of goods that the money buys before and after",
)

CONCEPTS = (CAPM, WACC, BREAK_EVEN, PUT_CALL_PARITY, SHARPE, FISHER)
