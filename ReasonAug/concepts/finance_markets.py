"""Finance families about risk, capital and markets; each answer is found twice."""

from __future__ import annotations

import math
from fractions import Fraction
from random import Random

from ReasonAug.problem import FINANCE, Concept, Values, agree


def _capm(rng: Random) -> Values:
    free, market = rng.randint(5, 40) / 10, rng.randint(60, 120) / 10
    beta = rng.choice((0.4, 0.6, 0.8, 0.9, 1.1, 1.2, 1.4, 1.5, 1.7))
    expected = free + beta * (market - free)
    agree((1 - beta) * free + beta * market, expected)  # a portfolio with the same market risk
    return {
        "free": free, "market": market, "beta": beta, "premium": market - free,
        "expected": expected,
    }  # fmt: skip


CAPM = Concept(
    name="Capital Asset Pricing Model",
    domain=FINANCE,
    draw=_capm,
    verified_by="return of the market-and-cash portfolio with the same exposure",
    definition="""
    The expected return of an asset is the risk-free rate plus its beta times the market risk
    premium: E = rf + beta (rm - rf). Only risk that moves with the market is rewarded.
    """,
    forms="""
    Treasury bills yield {free} % and the market as a whole is expected to return {market} %. A
    stock moves {beta} times as strongly as the market. What return should investors require?

    {who} analyses a company whose sensitivity to the market index is {beta}. Safe deposits bring
    {free} percent, the index is expected to bring {market} percent. Which expected return is
    appropriate?

    For a valuation, the cost of equity is needed. Sensitivity coefficient: {beta}; government
    paper: {free} %; broad share portfolio: {market} %. Compute it.

    Whenever the whole exchange rises by one percent, this paper rises by {beta} percent. Without
    any danger one earns {free} %, with the whole exchange {market} % on average. What may the
    holder of this paper fairly hope for per year?
    """,
    solutions="""
    Capital asset pricing model: {free} + {beta} * ({market} - {free}) = {expected:.4g} %.

    The market risk premium is {premium:.4g} %. CAPM rewards beta only: risk-free rate + beta *
    premium = {free} + {beta} * {premium:.4g} = {expected:.4g} % expected return.
    """,
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


WACC = Concept(
    name="Weighted Average Cost of Capital",
    domain=FINANCE,
    draw=_wacc,
    verified_by="exact yearly payments to owners and lenders over total capital",
    definition="""
    A firm financed with equity E and debt D pays on average E/(E+D) times the cost of equity plus
    D/(E+D) times the cost of debt after tax.
    """,
    forms="""
    A firm has {equity} million of equity, on which owners expect {cost_e} %, and {debt} million of
    debt at {cost_d} %. Interest is deductible at a tax rate of {tax} %. What does its capital cost
    on average?

    {who} needs a hurdle rate. Shareholders supplied {equity} m and want {cost_e} percent; banks
    supplied {debt} m at {cost_d} percent before the {tax} percent tax relief. Find the blended
    rate.

    The operator of {place} is financed by {equity} m of shares (required return {cost_e} %) and
    {debt} m of loans ({cost_d} %, tax {tax} %). Determine the overall percentage that new projects
    must earn.

    Two sorts of money fund the business: owners' funds, {equity} m, for which {cost_e} % is asked,
    and borrowed funds, {debt} m, for {cost_d} %, of which the treasury gives back {tax} % as
    relief. How expensive is one unit of money, both sorts taken together?
    """,
    solutions="""
    Weighted average cost of capital: {equity}/{total} * {cost_e} + {debt}/{total} * {cost_d} * (1 -
    0.{tax}) = {average:.4g} %.

    Debt costs {net:.4g} % after tax. Weighting equity and debt with their shares of the total
    capital of {total} million, WACC = {average:.4g} %.
    """,
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


BREAK_EVEN = Concept(
    name="Break-Even Point",
    domain=FINANCE,
    draw=_break_even,
    held_out=True,
    verified_by="raising the quantity until revenue covers cost",
    definition="""
    The break-even quantity is the number of units at which the contribution margin, price less
    variable cost, has paid the fixed costs: Q = F / (p - v).
    """,
    forms="""
    Producing mugs costs {fixed} a year in rent and wages, plus {variable} for each mug. A mug sells
    for {price}. How many must be sold so that no loss is made?

    {who} opens a stand at {place}. Overheads come to {fixed}, ingredients to {variable} per
    portion, and a portion is sold at {price}. From which number of portions does the stand stop
    losing money?

    A workshop has fixed costs of {fixed}. Every unit needs material for {variable} and brings in
    {price}. What output covers all costs?

    Before the first customer comes, {fixed} has been spent. Each customer pays {price} and causes
    expenses of {variable}. How many customers are needed until the spending is recovered?
    """,
    solutions="""
    Break-even: contribution margin per unit {price} - {variable} = {margin}. Fixed costs {fixed} /
    {margin}, rounded up, give {units} units (revenue {revenue}).

    Each unit sold contributes {margin} towards the fixed costs of {fixed}. The break-even quantity
    is {fixed}/{margin}, that is {units} units; below it there is a loss, above it a profit.
    """,
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


PUT_CALL_PARITY = Concept(
    name="Put-Call Parity",
    domain=FINANCE,
    draw=_parity,
    held_out=True,
    verified_by="equal payoffs of the two portfolios in every final state, equal cost today",
    definition="""
    A European call plus the discounted strike pays the same as a European put plus the share, so C
    + K exp(-rT) = P + S. Otherwise there would be an arbitrage.
    """,
    forms="""
    A European put with strike {strike} and {years} years to expiry costs {put:.2f}. The share
    stands at {spot} and the continuously compounded interest rate is {rate} %. What must the call
    with the same strike and expiry cost?

    {who} can buy the right to sell a stock at {strike} in {years} years for {put:.2f}. The stock
    trades at {spot}, money grows at {rate} percent (continuous). At which premium is the right to
    buy at the same terms free of arbitrage?

    Options on a share quoted at {spot} expire in {years} years, exercise price {strike}. The
    selling option is priced {put:.2f}, interest is {rate} % with continuous compounding. Price the
    buying option.

    Somebody quotes {put:.2f} for insurance against a share falling below {strike} within {years}
    years. The share itself is at {spot}; riskless growth is {rate} % per year, continuously. What
    is the fair premium for profiting from every rise above {strike} on the same date?
    """,
    solutions="""
    Put-call parity: C = P + S - K exp(-rT) = {put:.2f} + {spot} - {discounted:.4f} = {call:.4f}.

    A call plus the discounted strike K exp(-r T) = {discounted:.4f} has the payoff of a put plus
    the share. No arbitrage: the call option costs {put:.2f} + {spot} - {discounted:.4f} =
    {call:.4f}.
    """,
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


SHARPE = Concept(
    name="Sharpe Ratio",
    domain=FINANCE,
    draw=_sharpe,
    verified_by="variance from all pairwise differences",
    definition="""
    The Sharpe ratio of a portfolio is its mean return above the risk-free rate divided by the
    standard deviation of its returns: reward per unit of volatility.
    """,
    forms="""
    A fund returned {returns} percent in successive years, while cash paid {free} %. How much excess
    return did it earn per unit of volatility?

    {who} compares portfolios by reward for fluctuation. For yearly results of {returns} percent and
    a safe rate of {free} percent, compute the figure (sample standard deviation).

    The pension fund of {place} reports annual returns of {returns} (in %). Relative to the
    risk-free {free} %, what is its risk-adjusted performance?

    Gains of {returns} percent were booked one after the other. A savings book would have given
    {free} percent. Divide what was earned on top by how strongly the gains scattered: what comes
    out?
    """,
    solutions="""
    Sharpe ratio: mean return {mean:.4g} % less {free} % gives an excess of {excess:.4g} %; the
    standard deviation is {deviation:.4g} %; the ratio is {ratio:.4g}.

    Mean {mean:.4g}, sample standard deviation {deviation:.4g}. Excess return per unit of risk, the
    Sharpe ratio of the portfolio, is ({mean:.4g} - {free}) / {deviation:.4g} = {ratio:.4g}.
    """,
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


FISHER = Concept(
    name="Fisher Equation (Real Interest Rate)",
    domain=FINANCE,
    draw=_fisher,
    verified_by="number of baskets of goods that the money buys before and after",
    definition="""
    Nominal rate i, real rate r and inflation p satisfy 1 + i = (1 + r)(1 + p). The real rate says
    how much purchasing power grows; i - p is only an approximation.
    """,
    forms="""
    An account pays {nominal} % a year while prices rise by {inflation} %. By what percentage does
    the purchasing power of the money change?

    {who} earned {nominal} percent on savings, but everything in the shops became {inflation}
    percent dearer. How much richer is {who} in terms of goods?

    With a nominal yield of {nominal} % and inflation of {inflation} %, what exact rate of return
    remains after adjusting for the price level?

    A year ago a sum would have filled a hundred shopping carts. It has since grown by {nominal} %,
    and the content of a cart costs {inflation} % more. By how many percent has the number of carts
    changed?
    """,
    solutions="""
    Fisher equation: (1 + {nominal}/100) / (1 + {inflation}/100) - 1 = {real:.4g} % real interest.
    The difference {rough:.4g} % is only an approximation.

    Divide growth of money by growth of prices. The real interest rate is (100 + {nominal}) / (100 +
    {inflation}) - 1 = {real:.4g} %: that is the inflation-adjusted change of purchasing power.
    """,
)

CONCEPTS = (CAPM, WACC, BREAK_EVEN, PUT_CALL_PARITY, SHARPE, FISHER)
