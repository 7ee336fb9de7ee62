// Questions of this visit, and what has come of their answers so far.

const KEPT_ANSWERS = 24;

class Asked {
  constructor(question) {
    this.question = question;
    this.key = keyOf(question);
    this.status = "asking"; // then done, cancelled or failed
    this.id = null; // the service's name for it
    this.answer = null; // the last whole answer
    this.results = null; // the same for the components, with what has come since
    this.text = "The question is on its way.";
    this.count = null; // [done, of] of what is being done
    this.began = performance.now();
    this.controller = new AbortController();
    this.wasCancelled = false;
  }

  // Asks, and calls `told` with the name of each event after it.
  async run(told) {
    try {
      const options = { method: "POST", body: this.question, signal: this.controller.signal };
      for await (const { event, data } of client.events("v1/influence", options)) {
        this.take(event, data);
        told(event, data);
      }
      if (this.status === "asking") {
        throw new Refusal("The service ended before its answer was whole. Ask again.");
      }
    } catch (error) {
      this.end(error);
      told("end");
      if (this.status === "failed" && !(error instanceof Refusal)) throw error;
    }
  }

  take(event, data) {
    const takers = {
      queued: () => {
        this.id = data.id;
        this.text = data.before
          ? `Waiting: ${plural(data.before, "question")} ${data.before === 1 ? "is" : "are"} before this one.`
          : "The service takes the question.";
      },
      started: () => this.tell("Scores of all sequences, from the index …"),
      progress: () => {
        this.count = [data.done, data.of];
        if (!this.results) this.text = `${data.what} …`;
      },
      ranking: () => {
        this.fill(data);
        const number = grouped.format(data.num_sequences);
        this.tell(`All ${number} sequences are ranked. Exact scores of those at either end follow …`);
      },
      sequence: () => addSequence(this.results, data),
      answer: () => {
        this.status = "done";
        this.fill(data);
        this.tell(doneText(data));
      },
      error: () => {
        throw new Refusal(data.detail, data.status);
      },
    };
    takers[event]?.();
  }

  tell(text) {
    this.text = text;
    this.count = null;
  }

  fill(answer) {
    this.id = answer.id;
    this.answer = answer;
    this.results = resultsOf(answer, this.status);
  }

  end(error) {
    if (!(error instanceof Refusal)) this.controller.abort(); // nothing more of it is read
    const cancelled = this.wasCancelled || error.name === "AbortError";
    this.status = cancelled ? "cancelled" : "failed";
    this.count = null;
    const rest = this.results ? " What had come is below." : "";
    if (cancelled) this.text = `Cancelled.${rest}`;
    else this.text = `${error instanceof Refusal ? error.message : "The answer cannot be read."}${rest}`;
    if (this.results) this.results.noDetails = WHY_NO_DETAILS[this.status];
  }

  // Tells the service, and then hangs up, which tells it too.
  async cancel() {
    this.wasCancelled = true;
    try {
      if (this.id === null) return;
      const signal = AbortSignal.timeout(2000);
      await client.send(`v1/influence/${encodeURIComponent(this.id)}`, { method: "DELETE", signal });
    } catch (error) {
      if (!(error instanceof Refusal)) throw error; // it has ended already, or is not reached
    } finally {
      this.controller.abort();
    }
  }
}

function doneText({ num_sequences: number, seconds, stage }) {
  const parts = [
    seconds.waited >= 0.05 ? `${unsigned(seconds.waited, 2)} s waiting` : "",
    `${unsigned(seconds.ranking, 2)} s for the ranking of all ${grouped.format(number)} sequences`,
    stage === "exact" ? `${unsigned(seconds.exact, 2)} s for exact scores` : "",
  ];
  return `Answered: ${parts.filter(Boolean).join(", ")}.`;
}

const visit = {
  asked: new Map(), // by key; the last one asked is the last

  get running() {
    return [...this.asked.values()].some((one) => one.status === "asking");
  },

  add(asked) {
    this.asked.delete(asked.key);
    this.asked.set(asked.key, asked);
    for (const [key, one] of this.asked) {
      if (this.asked.size <= KEPT_ANSWERS) break;
      if (one.status !== "asking") this.asked.delete(key);
    }
  },
};
