"""Finance families about the time value of money; each answer is found twice."""

from __future__ import annotations

from pathlib import Path
from random import Random

from pipeline.config.loading import read_yaml
from ReasonAug.problem import FINANCE, Concept, Values, agree

TEXTS = read_yaml(Path(__file__).with_suffix(".yaml"))


def _compound(rng: Random) -> Values:
    amount = rng.randrange(500, 20000, 250)
    rate, years = rng.randint(10, 80) / 10, rng.randint(2, 15)
    final = amount * (1 + rate / 100) ** years
    balance = float(amount)
    for _ in range(years):
        balance += balance * rate / 100
    agree(balance, final)
    return {
        "amount": amount, "rate": rate, "years": years, "final": final,
        "interest": final - amount, "factor": 1 + rate / 100,
    }  # fmt: skip


COMPOUND_INTEREST = Concept.with_texts(
    TEXTS,
    name="Compound Interest",
    domain=FINANCE,
    draw=_compound,
    verified_by="year-by-year account statement",
)


def _npv(rng: Random) -> Values:
    cost = rng.randrange(4000, 20000, 500)
    flows = [rng.randrange(1000, 9000, 250) for _ in range(rng.randint(3, 5))]
    rate = rng.randint(4, 14)
    terms = [flow / (1 + rate / 100) ** (year + 1) for year, flow in enumerate(flows)]
    value = sum(terms) - cost
    nested = 0.0  # Horner: bring everything back one year at a time
    for flow in reversed(flows):
        nested = (nested + flow) / (1 + rate / 100)
    agree(nested - cost, value)
    return {
        "cost": cost, "flows": ", ".join(map(str, flows)), "rate": rate,
        "terms": " + ".join(f"{term:.2f}" for term in terms), "value": value,
        "verdict": "worth doing" if value > 0 else "not worth doing", "years": len(flows),
    }  # fmt: skip


NPV = Concept.with_texts(
    TEXTS,
    name="Net Present Value",
    domain=FINANCE,
    draw=_npv,
    verified_by="nested discounting, one year at a time",
)


def _loan(rng: Random) -> Values:
    loan = rng.randrange(5000, 200000, 2500)
    rate, years = rng.randint(20, 80) / 10, rng.choice((3, 5, 8, 10, 15, 20))
    monthly, months = rate / 1200, 12 * years
    payment = loan * monthly / (1 - (1 + monthly) ** -months)
    debt = float(loan)
    for _ in range(months):
        debt += debt * monthly - payment
    agree(loan + debt, loan)  # nothing is owed after the last instalment
    return {
        "loan": loan, "rate": rate, "years": years, "months": months,
        "payment": payment, "total": payment * months,
    }  # fmt: skip


LOAN = Concept.with_texts(
    TEXTS,
    name="Annuity Loan Payment (Amortization)",
    domain=FINANCE,
    draw=_loan,
    verified_by="repayment schedule that ends at zero debt",
)


def _gordon(rng: Random) -> Values:
    dividend = rng.randint(10, 90) / 10
    growth = rng.randint(5, 35) / 10
    rate = growth + rng.randint(20, 70) / 10
    price = dividend / ((rate - growth) / 100)
    total, paid, factor = 0.0, dividend, 1.0  # sum four thousand years of dividends
    for _ in range(4000):
        factor /= 1 + rate / 100
        total += paid * factor
        paid *= 1 + growth / 100
    agree(total, price)
    return {
        "dividend": dividend, "growth": growth, "rate": f"{rate:.4g}", "price": price,
        "spread": f"{rate - growth:.4g}",
    }  # fmt: skip


GORDON = Concept.with_texts(
    TEXTS,
    name="Gordon Growth Model",
    domain=FINANCE,
    draw=_gordon,
    verified_by="direct summation of four thousand discounted dividends",
)


def _bond(rng: Random) -> Values:
    coupon, rate, years = rng.randint(1, 9), rng.randint(1, 9), rng.randint(3, 12)
    discount = 1 + rate / 100
    price = sum(10 * coupon / discount**t for t in range(1, years + 1)) + 1000 / discount**years
    value = 1000.0  # backwards: the price a year earlier is (value + coupon) / (1 + r)
    for _ in range(years):
        value = (value + 10 * coupon) / discount
    agree(value, price)
    return {
        "coupon": coupon, "rate": rate, "years": years, "price": price, "cash": 10 * coupon,
        "side": "above" if coupon > rate else "below" if coupon < rate else "exactly at",
    }  # fmt: skip


BOND = Concept.with_texts(
    TEXTS,
    name="Bond Pricing",
    domain=FINANCE,
    draw=_bond,
    verified_by="backward recursion from maturity",
)


def _depreciation(rng: Random) -> Values:
    cost, rate = rng.randrange(8000, 90000, 1000), rng.choice((10, 15, 20, 25, 30))
    years = rng.randint(3, 8)
    book = cost * (1 - rate / 100) ** years
    value, charges = float(cost), []
    for _ in range(years):
        charges.append(value * rate / 100)
        value -= charges[-1]
    agree(value, book)
    agree(cost - sum(charges), book)
    return {
        "cost": cost, "rate": rate, "years": years, "book": book, "keep": 100 - rate,
        "last": charges[-1],
    }  # fmt: skip


DEPRECIATION = Concept.with_texts(
    TEXTS,
    name="Declining Balance Depreciation",
    domain=FINANCE,
    draw=_depreciation,
    verified_by="schedule of yearly charges",
)

CONCEPTS = (COMPOUND_INTEREST, NPV, LOAN, GORDON, BOND, DEPRECIATION)
