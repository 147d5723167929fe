"""The orders of a small web shop: the program that the tutorial builds and kills.

    python shop.py stock shop.db            # put products on the shelf
    python shop.py sell shop.db             # sell until somebody kills it
    python shop.py invoice shop.db          # write the invoices that are missing
    python shop.py check shop.db sold.txt   # is every order that was confirmed still there?

An order takes its products off the shelf in the same transaction, so the two always agree.  It is
confirmed, as a line of standard output, when that transaction is durable.  Invoices are written
by a consumer: it goes on where it was, and writes each invoice exactly once.  Everything that the
database commits is also kept in an archive next to it.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager

import msgspec
import trio

import trio_wal
from trio_wal import Database, Table


class Product(msgspec.Struct, frozen=True):
    cents: int
    stock: int


class Order(msgspec.Struct, frozen=True):
    customer: str
    product: str
    quantity: int


class SoldOutError(Exception):
    """There is less on the shelf than was ordered."""


products = Table("products", key=str, value=Product)
orders = Table("orders", key=int, value=Order)
invoices = Table("invoices", key=int, value=int)  # by order: what it costs, in cents


def open_shop(path: str) -> AbstractAsyncContextManager[Database]:
    return trio_wal.open_database(path, archive=trio_wal.DirectoryArchive(f"{path}.archive"))


async def stock(db: Database, quantity: int) -> None:
    async with db.transaction() as tx:
        products.put(tx, "blue", Product(1999, quantity))
        products.put(tx, "red", Product(2499, quantity))


async def place(db: Database, order: Order) -> int:
    """The number of the order, once it is durable; `SoldOutError`: nothing has changed."""
    async with db.transaction() as tx:
        product = products.get(tx, order.product)
        if product is None or product.stock < order.quantity:
            raise SoldOutError(order.product)
        left = product.stock - order.quantity
        products.put(tx, order.product, msgspec.structs.replace(product, stock=left))
        last = next(orders.scan(tx, reverse=True, limit=1), None)
        number = 1 if last is None else last[0] + 1
        orders.insert(tx, number, order)
    return number


async def customer(db: Database, name: str) -> None:
    """Buys for ever, or until the shelf is empty."""
    while True:
        order = Order(name, random.choice(["blue", "red"]), random.randrange(1, 4))
        number = await place(db, order)
        print("confirmed", number, flush=True)


async def sell(db: Database, customers: int) -> None:
    async with trio.open_nursery() as nursery:
        for number in range(customers):
            nursery.start_soon(customer, db, f"customer {number}")


async def invoice(db: Database) -> int:
    """Writes the invoices of all orders that are there now; returns how many were missing."""
    written = 0
    newest = db.durable_lsn
    async with db.consumer("invoices") as consumer:
        async for commit in consumer:
            async with db.transaction() as tx:
                for operation in commit.operations:
                    number, order = orders.decode(operation) or (0, None)
                    if order is not None:
                        product = products.get(tx, order.product)
                        assert product is not None
                        invoices.insert(tx, number, product.cents * order.quantity)
                        written += 1
                consumer.acknowledge_in(tx, commit)
            if commit.lsn >= newest:
                return written
    raise AssertionError("a consumer follows for ever")


def check(db: Database, lines: Iterable[str]) -> str:
    """Whether every confirmed order is there; a line that the kill cut off does not count."""
    confirmed = {int(line.split()[1]) for line in lines if line.endswith("\n")}
    found = dict(orders.scan(db))
    missing = len(confirmed - found.keys())
    return f"{len(confirmed):,} confirmed, {missing:,} missing"


async def main(what: str, path: str, argument: str) -> None:
    async with open_shop(path) as db:
        if what == "stock":
            await stock(db, 1_000_000)
        elif what == "sell":
            await sell(db, customers=16)
        elif what == "invoice":
            print("invoices written:", await invoice(db))
        else:
            async with await trio.open_file(argument) as file:
                print(check(db, [line async for line in file]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The orders of a small web shop.")
    parser.add_argument("what", choices=["stock", "sell", "invoice", "check"])
    parser.add_argument("path")
    parser.add_argument("confirmed", nargs="?", default="", help="for check: what sell printed")
    given = parser.parse_args()
    trio.run(main, given.what, given.path, given.confirmed)
