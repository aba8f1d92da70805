"""Finance families about the time value of money; each answer is found twice."""

from __future__ import annotations

from random import Random

from ReasonAug.problem import FINANCE, Concept, Values, agree


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


COMPOUND_INTEREST = Concept(
    name="Compound Interest",
    domain=FINANCE,
    draw=_compound,
    verified_by="year-by-year account statement",
    definition="""
    When interest is added to the balance and earns interest itself, a capital P grows in n periods
    at rate r per period to P (1 + r)^n.
    """,
    forms="""
    {who} puts {amount} euros into a savings account that pays {rate} % a year. Interest is credited
    every year and left in the account. What is the balance after {years} years?

    A deposit of {amount} dollars grows by {rate} percent annually, each year's gain being added to
    the sum on which the next gain is computed. How large is it after {years} years?

    The club of {place} locks away {amount} pounds for {years} years. The bank adds {rate} % to
    whatever is there at the end of each year. How much can be withdrawn in the end?

    An untouched nest egg of {amount} francs swells by {rate} % every twelve months, gains staying
    inside. To what sum has it swollen when {years} years are over?
    """,
    solutions="""
    Compound interest: {amount} * {factor:.4g}^{years} = {final:,.2f}. The interest earned is
    {interest:,.2f}.

    Because interest earns interest, the balance is multiplied by 1 + {rate}/100 = {factor:.4g} each
    year. After {years} years: P (1 + r)^n = {amount} * {factor:.4g}^{years} = {final:,.2f}.
    """,
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


NPV = Concept(
    name="Net Present Value",
    domain=FINANCE,
    draw=_npv,
    verified_by="nested discounting, one year at a time",
    definition="""
    The net present value of a project is the sum of its cash flows, each discounted to today with
    (1 + r)^t, less the initial outlay. A project with a positive value adds wealth.
    """,
    forms="""
    A project costs {cost} today and returns {flows} at the ends of the next {years} years. Capital
    could earn {rate} % elsewhere. What is the project worth today, and should it be done?

    {who} considers a machine for {place}: price {cost}, savings of {flows} in consecutive years.
    With a required return of {rate} percent, is the purchase sensible, and by how much?

    Buying a licence means paying {cost} at once for yearly receipts of {flows}. Discount at {rate}
    %. Compute the gain or loss in today's money.

    The board must decide on an outlay of {cost}. Expected takings, year after year: {flows}. If
    money due in the future shrinks by {rate} % for every year of waiting, does the plan pay off,
    and how much is left over?
    """,
    solutions="""
    Net present value: {terms} - {cost} = {value:,.2f}. The investment is {verdict}.

    Each cash flow is discounted with (1 + {rate}/100)^t. Present values of the inflows: {terms}.
    Subtracting the initial outlay of {cost} leaves NPV = {value:,.2f}, so the project is {verdict}.
    """,
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


LOAN = Concept(
    name="Annuity Loan Payment (Amortization)",
    domain=FINANCE,
    draw=_loan,
    verified_by="repayment schedule that ends at zero debt",
    definition="""
    A loan L that is repaid in n equal instalments at interest i per period has the payment A = L i
    / (1 - (1 + i)^-n). The interest part of each instalment shrinks, the repayment part grows.
    """,
    forms="""
    {who} borrows {loan} at {rate} % a year, charged monthly, and repays it in {months} equal
    monthly instalments. How large is an instalment?

    A mortgage of {loan} runs for {years} years with a nominal rate of {rate} percent. Each month
    the same sum is due, covering interest and repayment. What is that sum?

    To renovate {place}, a credit of {loan} is taken up. It must be gone after {years} years of
    constant monthly payments; the lender asks {rate} % per year. Find the payment.

    The debt is {loan}; every month one twelfth of {rate} % is charged on what is still owed. Which
    never-changing monthly transfer wipes the debt out after exactly {years} years?
    """,
    solutions="""
    Annuity formula: with i = {rate}/1200 and n = {months}, the loan payment is {loan} i / (1 - (1 +
    i)^-n) = {payment:,.2f} per month, {total:,.2f} in total.

    The present value of {months} equal payments must equal the loan. Amortization with monthly
    interest i = {rate}/12 % gives A = L i / (1 - (1 + i)^-n) = {payment:,.2f}.
    """,
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


GORDON = Concept(
    name="Gordon Growth Model",
    domain=FINANCE,
    draw=_gordon,
    verified_by="direct summation of four thousand discounted dividends",
    definition="""
    A share whose dividend grows for ever at rate g, discounted at r > g, is worth D1 / (r - g),
    where D1 is the next dividend.
    """,
    forms="""
    A share will pay a dividend of {dividend} next year, and the dividend rises by {growth} % every
    year for ever. Investors ask for a return of {rate} %. What is a fair price?

    {who} inherits stock of a company whose yearly payout, {dividend} in twelve months, climbs
    {growth} percent annually without end. Using a required yield of {rate} percent, value one
    share.

    Next year's distribution is {dividend} per share and is expected to increase by {growth} % each
    year in perpetuity. What should the stock cost when the cost of equity is {rate} %?

    An endless stream of payments to owners starts at {dividend} a year from now, every payment
    {growth} % above the one before. What would you give for one certificate if you want {rate} % a
    year on your money?
    """,
    solutions="""
    Gordon growth model: price = D1 / (r - g) = {dividend} / {spread} % = {price:,.2f}.

    A growing perpetuity is worth the next dividend divided by the gap of required return and
    growth: {dividend} / (0.01 * ({rate} - {growth})) = {price:,.2f} per share.
    """,
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


BOND = Concept(
    name="Bond Pricing",
    domain=FINANCE,
    draw=_bond,
    verified_by="backward recursion from maturity",
    definition="""
    The price of a bond is the present value of its coupons plus the present value of its face
    value, discounted at the market yield. It is above par when the coupon rate exceeds the yield.
    """,
    forms="""
    A bond with face value 1000 pays {coupon} % once a year and matures in {years} years. The market
    yield is {rate} %. What is its price today?

    {who} is offered a government note: {cash} every year for {years} years and then 1000 back.
    Similar paper yields {rate} percent. How much is the note worth?

    The municipality that owns {place} issued paper with a nominal of 1000 and a coupon of {coupon}
    percent; {years} yearly coupons are left. At a yield to maturity of {rate} %, find the fair
    quote.

    Lenders receive {cash} per year, and the principal of 1000 when the contract ends in {years}
    years. New contracts bring {rate} %. At what price would the old contract change hands?
    """,
    solutions="""
    Bond price = present value of coupons + present value of face value = sum of {cash} /
    1.0{rate}^t for t = 1..{years} plus 1000 / 1.0{rate}^{years} = {price:,.2f}, {side} par.

    Discount each coupon of {cash} and the redemption of 1000 at the yield of {rate} %. The bond is
    worth {price:,.2f}; it trades {side} par, as the coupon rate is {coupon} %.
    """,
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


DEPRECIATION = Concept(
    name="Declining Balance Depreciation",
    domain=FINANCE,
    draw=_depreciation,
    verified_by="schedule of yearly charges",
    definition="""
    The declining balance method writes off the same percentage of the remaining book value each
    year, so that after n years the book value is C (1 - d)^n.
    """,
    forms="""
    A machine was bought for {cost}. Each year {rate} % of its remaining book value is written off.
    What is its book value after {years} years, and how large is the last charge?

    The delivery van of {place} cost {cost}. For tax purposes it loses {rate} percent of what it is
    still worth on paper, every year. What does the balance sheet show after {years} years?

    {who} keeps the asset register. An installation, acquisition cost {cost}, is reduced yearly by
    {rate} % of the residual amount. Find the residual amount at the end of year {years}.

    New equipment at {cost} wears out: the accounts shrink its figure by {rate} % of the previous
    figure at every year's end. Which figure stands there after {years} such entries?
    """,
    solutions="""
    Declining balance depreciation: {cost} * 0.{keep}^{years} = {book:,.2f}. The charge of the last
    year is {last:,.2f}.

    Writing off {rate} % of the remaining book value leaves {keep} % each year. After {years} years
    the depreciated asset is carried at {book:,.2f}; the last yearly depreciation was {last:,.2f}.
    """,
)

CONCEPTS = (COMPOUND_INTEREST, NPV, LOAN, GORDON, BOND, DEPRECIATION)
