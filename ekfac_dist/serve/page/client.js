// Requests to the service: its token, its errors as sentences, its streams.

const TOKEN = "ekfac-dist-token"; // in the session's storage, which the browser forgets with the tab

// Why there is no answer, as a sentence for who asked.
class Refusal extends Error {
  constructor(sentence, status = null) {
    super(sentence);
    this.status = status;
  }
}

const client = {
  // A response whose status is good. Asks for the token where the service wants one.
  async send(path, { method = "GET", body = null, accept = "application/json", signal = null } = {}) {
    for (;;) {
      const token = sessionStorage.getItem(TOKEN);
      const headers = { Accept: accept };
      if (token !== null) headers.Authorization = `Bearer ${token}`;
      if (body !== null) headers["Content-Type"] = "application/json";
      const response = await reached(
        fetch(path, { method, headers, body: body && JSON.stringify(body), signal, cache: "no-store" })
      );
      if (response.ok) return response;
      if (response.status !== 401) throw await refusal(response);
      await tokenDialog.ask(token !== null && token === sessionStorage.getItem(TOKEN));
    }
  },

  async json(path, options) {
    const response = await this.send(path, options);
    return reached(response.json());
  },

  // The events of a stream, as {event, data}.
  async *events(path, options) {
    const response = await this.send(path, { ...options, accept: "text/event-stream" });
    // Not through a TextDecoderStream, with which Chromium at times aborts requests that have ended.
    const reader = response.body.getReader();
    const decoder = new TextDecoder();
    let [line, event, lines] = [[], "message", []];
    for (;;) {
      const { value, done } = await reached(reader.read());
      if (done) return;
      const pieces = decoder.decode(value, { stream: true }).split("\n");
      for (const [k, piece] of pieces.entries()) {
        line.push(piece);
        if (k === pieces.length - 1) break; // goes on with what comes next
        const text = line.join("").replace(/\r$/, "");
        line = [];
        if (text.startsWith("event:")) event = text.slice(6).trim();
        else if (text.startsWith("data:")) lines.push(text.slice(5));
        else if (text === "") {
          if (lines.length) yield { event, data: JSON.parse(lines.join("\n")) };
          [event, lines] = ["message", []];
        }
      }
    }
  },
};

// The value of a promise of the network's; its failure as a sentence. Cancelling is none.
async function reached(promise) {
  try {
    return await promise;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The service cannot be reached: it has ended, or the network between is gone.");
  }
}

async function refusal(response) {
  const { status } = response;
  if (status === 429) {
    const seconds = Number(response.headers.get("Retry-After"));
    const when = seconds > 0 ? `in ${plural(seconds, "second")}` : "a little later";
    return new Refusal(`As many questions wait already as the service takes. Try again ${when}.`, status);
  }
  let detail = null;
  try {
    ({ detail } = await response.json());
  } catch {
    // No JSON: something else than the service has answered.
  }
  if (Array.isArray(detail) && detail.length) {
    const { loc, msg } = detail[0];
    detail = `${(loc || []).slice(1).join(".")}: ${msg}.`;
  }
  return new Refusal(typeof detail === "string" ? detail : `The service answered with status ${status}.`, status);
}

// -- the token: one dialog for all requests that wait for it --------------------------------------

const tokenDialog = {
  box: byId("token-dialog"),
  waiting: null,

  ask(wasWrong) {
    if (!this.waiting) {
      this.waiting = new Promise((resolve, reject) => {
        this.resolve = resolve;
        this.reject = reject;
      });
      byId("token").value = "";
      byId("token-note").textContent = wasWrong ? "The service does not take this token." : "";
      this.box.showModal();
    }
    return this.waiting;
  },

  end(settle) {
    this.waiting = null;
    this.box.close();
    settle();
  },
};

byId("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const token = byId("token").value.trim();
  if (!/^[\x21-\x7e]+$/.test(token)) {
    byId("token-note").textContent = "A token consists of letters, digits and signs, without spaces.";
    return;
  }
  sessionStorage.setItem(TOKEN, token);
  tokenDialog.end(tokenDialog.resolve);
});
const withoutToken = (event) => {
  event.preventDefault();
  tokenDialog.end(() => tokenDialog.reject(new Refusal("This service answers who gives its token.", 401)));
};
byId("token-cancel").addEventListener("click", withoutToken);
tokenDialog.box.addEventListener("cancel", withoutToken);
