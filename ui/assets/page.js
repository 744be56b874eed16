// The API key stays in this tab: it is kept in sessionStorage and travels only as the Authorization
// header of the page's own events, where the server reads it without keeping it.
(() => {
  const plainFetch = window.fetch;
  window.fetch = (input, init = {}) => {
    const key = sessionStorage.getItem("herd-api-key");
    const url = String(input.url ?? input);
    if (key && url.includes("/gradio_api/queue/join")) {
      const headers = new Headers(init.headers);
      headers.set("Authorization", "Bearer " + key);
      init = { ...init, headers };
    }
    const reply = plainFetch(input, init);
    return url.includes("/gradio_api/queue/data") ? reply.then(endOrderly) : reply;
  };

  // When the server goes away in mid-answer, Gradio's client takes its event stream for open for
  // ever, and the page is dead. A proper ending lets the next event open a new stream, with the
  // conversation still on the page.
  const farewell = [
    { msg: "unexpected_error", message: "The connection to the server broke.", success: false },
    { msg: "close_stream" },
  ];
  const farewellText = farewell.map((event) => `data: ${JSON.stringify(event)}\n\n`).join("");
  const showLost = (isLost) =>
    document.getElementById("herd-lost")?.classList.toggle("herd-shown", isLost);
  const endOrderly = (response) => {
    if (!response.ok) return response;
    showLost(false);
    const reader = response.body.getReader();
    const decoder = new TextDecoder("latin1"); // only to look for ASCII
    let isClosed = false;
    const body = new ReadableStream({
      async pull(controller) {
        const { done, value } = await reader.read().catch(() => ({ done: true }));
        if (done && !isClosed) {
          showLost(true);
          controller.enqueue(new TextEncoder().encode(farewellText));
        }
        if (done) return controller.close();
        isClosed ||= decoder.decode(value).includes('"msg":"close_stream"');
        controller.enqueue(value);
      },
      cancel: (reason) => reader.cancel(reason),
    });
    return new Response(body, { status: response.status, headers: response.headers });
  };
  // A file goes from the browser straight to the API; the page's server learns its id only.
  window.herdUpload = () =>
    new Promise((resolve) => {
      const input = document.createElement("input");
      input.type = "file";
      input.accept = ".jsonl,.json,.txt";
      input.oncancel = () => resolve([""]);
      input.onchange = async () => {
        const button = document.getElementById("herd-upload");
        button?.classList.add("herd-busy");
        resolve([await upload(input.files[0]).catch((error) => `failed ${error.message}`)]);
        button?.classList.remove("herd-busy");
      };
      input.click();
    });
  const upload = async (file) => {
    const form = new FormData();
    form.append("purpose", "fine-tune");
    form.append("file", file);
    const key = sessionStorage.getItem("herd-api-key");
    const headers = key ? { Authorization: "Bearer " + key } : {};
    const response = await plainFetch("v1/files", { method: "POST", body: form, headers });
    const reply = await response.json().catch(() => ({}));
    if (response.ok) return reply.id;
    return `refused ${reply.error?.message ?? response.statusText}`;
  };

  window.herdKeepKey = (key) =>
    // A header carries ASCII only.
    sessionStorage.setItem("herd-api-key", key.trim().replace(/[^!-~]/gu, encodeURIComponent));

  // Copying an answer leaves out its byline, which is the message's last part.
  const byline = /\s*<span class="herd-by"[^]*$/;
  const clipboard = navigator.clipboard; // absent where the page is served without TLS to other hosts
  const plainWrite = clipboard?.writeText.bind(clipboard);
  if (plainWrite) clipboard.writeText = (text) => plainWrite(text.replace(byline, ""));
})();
