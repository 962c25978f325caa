"""A night a day with Airflow: one task, since `nightly` resumes by itself at the first stage that has not succeeded."""

from datetime import datetime, timedelta

from airflow import DAG
from airflow.providers.standard.operators.bash import BashOperator

CHECKOUT = "/opt/mtmh"
CONFIG = "/etc/mtmh/shop.yaml"

with DAG(
    dag_id="mtmh",
    schedule="0 2 * * *",
    start_date=datetime(2024, 1, 1),
    catchup=False,
    max_active_runs=1,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=10), "cwd": CHECKOUT},
) as dag:
    # A retry after exit codes 2 to 4, which need a person, costs only the seconds until the message is said again.
    night = BashOperator(
        task_id="night",
        bash_command=f".venv/bin/python -m jobs.nightly --run-date {{{{ data_interval_start | ds }}}} --config {CONFIG}",
    )
    maintain = BashOperator(task_id="maintain", bash_command=f".venv/bin/python -m jobs.maintain --config {CONFIG}")
    night >> maintain
